"""Small files of weights: of an adapted network, and of mmsegmentation's keys."""

import torch
from torch import nn

from kdprof.models import AdaptedNetwork

CLASSES = ("road", "sky", "car")


def _maps(network, images):
    head = network.body(images)
    return {"logits": network.classifier(head), "head": head}


def own_network(value=None) -> AdaptedNetwork:
    """A network of 9 entries; every parameter has ``value`` if it is given."""
    module = nn.Module()
    module.body = nn.Sequential(nn.Conv2d(3, 4, 3, 4, 1), nn.BatchNorm2d(4))
    module.classifier = nn.Conv2d(4, len(CLASSES), 1)
    with torch.no_grad():
        for parameter in module.parameters() if value is not None else ():
            parameter.fill_(value)
    return AdaptedNetwork(module, _maps, len(CLASSES), name="mine")


def own_state(value=None) -> dict[str, torch.Tensor]:
    return dict(own_network(value).module.state_dict())


def mmseg_state(value=0.0) -> dict[str, torch.Tensor]:
    """Just enough of a PSPNet for it to be recognised."""
    return {
        "backbone.stem.0.weight": torch.full((2, 3, 3, 3), value),
        "decode_head.psp_modules.0.1.conv.weight": torch.full((8, 8, 1, 1), value),
        "decode_head.bottleneck.conv.weight": torch.full((8, 8, 3, 3), value),
        "decode_head.conv_seg.weight": torch.full((3, 8, 1, 1), value),
    }


def prefixed(prefix: str, state):
    return {prefix + key: value for key, value in state.items()}


def saved(path, content):
    torch.save(content, path)
    return path
