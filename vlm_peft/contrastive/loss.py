"""Contrastive losses over pictures with any number of texts each.

Stage: unit embeddings -> loss. With one text a picture they are the model's own (`CLIPModel(return_loss=True)`,
`SiglipModel(return_loss=True)`); with several, a picture's other texts, and equal texts of other pictures, are never
negatives: InfoNCE leaves them out of the denominator, SigLIP's loss counts them as positives.
"""

import torch
from torch import nn


def matches(picture_ids: torch.Tensor, picture_of: torch.Tensor, text_ids: torch.Tensor) -> torch.Tensor:
    """Which texts are true of which pictures: their own, and those that say the same.

    Args:
        picture_ids (`torch.Tensor`): `(P,)`, equal for equal pictures.
        picture_of (`torch.Tensor`): `(T,)`, place of each text's picture among the P.
        text_ids (`torch.Tensor`): `(T,)`, equal for texts that say the same.

    Returns:
        `torch.Tensor` of shape `(P, T)`, boolean.
    """
    own = picture_ids[:, None] == picture_ids[picture_of][None]
    same = text_ids[:, None] == text_ids[None]
    return (own.float() @ same.float()) > 0


def info_nce(logits: torch.Tensor, picture_of: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """InfoNCE, the mean of both directions.

    Text to picture, each text chooses its picture; picture to text, a picture chooses each of its texts in turn. What
    else is true takes no part.

    Args:
        logits (`torch.Tensor`): `(P, T)`, with the temperature.
        picture_of (`torch.Tensor`): `(T,)`.
        true (`torch.Tensor`): `(P, T)`, of [`matches`].

    Returns:
        Scalar.
    """
    texts = torch.arange(logits.shape[1], device=logits.device)
    own = logits[picture_of, texts]
    negatives = logits.masked_fill(true, float("-inf"))
    to_picture = torch.logaddexp(own, negatives.logsumexp(dim=0)) - own
    to_text = torch.logaddexp(own, negatives.logsumexp(dim=1)[picture_of]) - own
    # Each picture weighs the same, however many texts it has.
    weight = 1 / torch.bincount(picture_of, minlength=logits.shape[0])[picture_of]
    return (to_picture.mean() + (to_text * weight).sum() / logits.shape[0]) / 2


def sigmoid_loss(logits: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """SigLIP's loss (arXiv 2303.15343): each pair is judged alone; the sum over pairs per text.

    Args:
        logits (`torch.Tensor`): `(P, T)`, with temperature and bias.
        true (`torch.Tensor`): `(P, T)`, of [`matches`].

    Returns:
        Scalar.
    """
    return -nn.functional.logsigmoid(torch.where(true, logits, -logits)).sum() / logits.shape[1]
