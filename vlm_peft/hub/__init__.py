"""The Hub: adapters and data sets pushed in one commit, models pulled, and the licences that cards state."""
