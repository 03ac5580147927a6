"""A step over a pool of texts, by the layers and in torch: the pool's rows and pages without the
kernels that read them."""

import torch

from kimi_linear import KimiLinearCache


def taken_out(model, pool, row):
    """A cache of what the pool's tensors say of a text."""
    cache = KimiLinearCache(model.config, rollback_tokens=0)
    num_tokens = pool.lengths[row]
    pages = pool.pages[row, : pool.pages_for(num_tokens)].long()
    for i, layer in enumerate(cache.layers):
        if i in pool.latents:
            layer.fill([pool.latents[i][pages].flatten(0, 1)[None, :num_tokens].clone()], 1)
        else:
            layer.hold(pool.states[i].map(lambda x: x[row : row + 1].clone()), num_tokens)
    return cache


def step_in_torch(model, pool, rows, ids):
    """As `decode_pool`, of any number of tokens: ids [texts] or [texts, tokens] to logits of the
    last."""
    found = []
    for row, own in zip(rows, ids.view(len(rows), -1), strict=True):
        cache, start = taken_out(model, pool, row), pool.lengths[row]
        found.append(model(own[None], cache=cache).logits[0, -1])
        pool.count(row, len(own))
        for i, layer in enumerate(cache.layers):
            if i not in pool.latents:
                for target, new in zip(
                    pool.states[i].tensors(), layer.state.tensors(), strict=True
                ):
                    target[row] = new[0]
                continue
            text = torch.cat(layer.segments(), dim=1)[0]
            for place in range(start, len(text)):
                page = pool.pages[row, place // pool.page_tokens]
                pool.latents[i][page, place % pool.page_tokens] = text[place]
    return torch.stack(found)
