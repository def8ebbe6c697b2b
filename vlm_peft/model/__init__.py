"""What a `VisionQwen` is: configuration, parts, processor, and how two bases become one."""
