"""Latent attention as a plain softmax, with the sizes of a small GPU test."""

import torch

B, H, N, P, V, L = 2, 4, 128, 64, 128, 512
SCALING = (N + P) ** -0.5


def reference(query, latent, key_half, value_half, real):
    """Plain softmax in float64."""
    query, latent, key_half, value_half = (
        x.double() for x in (query, latent, key_half, value_half)
    )
    T, S = query.shape[1], latent.shape[1]
    key = torch.einsum("bsl,hnl->bshn", latent[..., :L], key_half)
    key = torch.cat([key, latent[:, :, None, L:].expand(-1, -1, H, -1)], dim=-1)
    value = torch.einsum("bsl,hvl->bshv", latent[..., :L], value_half)
    scores = torch.einsum("bthk,bshk->bhts", query, key) * SCALING
    seen = torch.ones(T, S, dtype=torch.bool, device=query.device).tril(S - T)
    seen = seen.expand(len(query), 1, T, S)
    if real is not None:
        seen = seen & real[:, None, None]
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0)
    return torch.einsum("bhts,bshv->bthv", weights, value)
