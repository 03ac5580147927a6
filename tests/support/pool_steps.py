"""A step over a pool of texts, by the layers and in torch: the pool's rows and pages without the
kernels that read them."""

import torch

from kimi_linear import KimiLinearCache


def taken_out(model, pool, row):
    """A cache of what the pool's tensors say of a text: its state, and what is pending. For that a
    step in torch notes ids, not updates of the state."""
    cache = KimiLinearCache(model.config, rollback_tokens=0)
    num_tokens, pending = pool.lengths[row], pool.pending[row] if pool.updates else 0
    settled = num_tokens - pending
    pages = pool.pages[row, : pool.pages_for(num_tokens)].long()
    for i, layer in enumerate(cache.layers):
        if i in pool.latents:
            layer.fill([pool.latents[i][pages].flatten(0, 1)[None, :settled].clone()], 1)
        else:
            layer.hold(pool.states[i].map(lambda x: x[row : row + 1].clone()), settled)
    if pending:
        (noted, *_) = pool.updates.values()
        places = torch.arange(settled, num_tokens) % noted.updates.shape[1]
        model(noted.updates[row, places, 0, 0].long()[None], cache=cache)
    return cache


@torch.no_grad()
def step_in_torch(model, pool, rows, ids):
    """As `decode_pool`."""
    if ids.ndim == 1:
        return step_in_torch(model, pool, rows, ids[:, None])[:, 0]
    found = []
    for row, own in zip(rows, ids, strict=True):
        cache, start = taken_out(model, pool, row), pool.lengths[row]
        before = cache.fork()
        found.append(model(own[None], cache=cache).logits[0])
        pool.count(row, len(own))
        for i, layer in enumerate(cache.layers):
            if i in pool.updates:
                layer = before.layers[i]
                places = torch.arange(start, start + len(own))
                pool.updates[i].updates[row, places % pool.updates[i].updates.shape[1], 0, 0] = (
                    own.float()
                )
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
