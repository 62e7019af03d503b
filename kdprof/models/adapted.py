"""Networks that are not kdprof's own: one's own file, SegFormer, segmentation_models.pytorch."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from kdprof.errors import UserError, unknown
from kdprof.method import FEATURE_TAPS, Network, NetworkInfo, Taps
from kdprof.models.network import Preprocessing
from kdprof.user_files import import_function

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
PROBE = 128
"""Height and width of the picture that channels and strides are read from."""

Maps = Callable[[nn.Module, Tensor], Mapping[str, Tensor]]
"""From a network and normalised pictures (N, 3, H, W) to its taps, each (N, C, h, w)."""


class AdaptedNetwork(Network):
    """Any network, with what kdprof reads of one.

    Attributes:
        multiple: 1; it is taken at its word for every size.

    Args:
        module: the network.
        maps: what it computes, by tap: ``logits`` at least; ``head`` (input of the classifier),
            ``aux`` (auxiliary logits) and ``c2`` to ``c5`` where it has them. All are computed at
            every step, whichever a method reads.
        num_classes: channels of the logits.
        mean, std: of its pictures, per RGB channel in 0..255.
        align_corners: how its logits are resized.
        name: what records call it.

    Raises:
        UserError: a tap that no network has, no logits, or logits of other classes.
    """

    multiple = 1

    def __init__(
        self,
        module: nn.Module,
        maps: Maps,
        num_classes: int,
        *,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        align_corners: bool = False,
        name: str = "own",
    ):
        super().__init__()
        self.module, self.maps, self.align_corners = module, maps, align_corners
        self.preprocessing = Preprocessing(mean, std)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.info = self._looked_at(name, num_classes)

    def forward(self, images: Tensor, taps: Collection[str]) -> Taps:
        """Return exactly what ``taps`` names; ``images`` are RGB (N, 3, H, W) in 0..255.

        Raises:
            UserError: a tap that this network lacks.
        """
        found = self.maps(self.module, (images - self.mean) / self.std)
        for tap in taps:
            if tap not in found:
                raise UserError(
                    f"{self.info.name} has no tap '{tap}'; it has {', '.join(sorted(found))}"
                )
        return Taps(**{tap: found[tap] for tap in taps})

    def check_input(self, batch: int, crop: tuple[int, int], training: bool) -> str | None:
        """Return None: what such a network cannot take, its first step says."""
        return None

    @torch.no_grad()
    def _looked_at(self, name: str, num_classes: int) -> NetworkInfo:
        """Return channels and strides, from one small picture."""
        training = self.module.training
        found = self.maps(self.module.eval(), torch.zeros(1, 3, PROBE, PROBE))
        self.module.train(training)
        for tap in found:
            if tap not in FEATURE_TAPS:
                raise UserError(f"{name}: {unknown('tap', tap, FEATURE_TAPS)}")
        if "logits" not in found:
            raise UserError(f"{name}: its maps hold no 'logits', only {', '.join(found)}")
        if found["logits"].shape[1] != num_classes:
            raise UserError(
                f"{name}: its logits have {found['logits'].shape[1]} channels for {num_classes} "
                "classes; build it with the classes it is given"
            )
        channels = {tap: value.shape[1] for tap, value in found.items()}
        stride = {tap: round(PROBE / value.shape[-1]) for tap, value in found.items()}
        return NetworkInfo(name, num_classes, channels, stride)


def is_adapted(name: str) -> bool:
    """Return whether a name is of such a network."""
    return ".py:" in name or name.startswith(("segformer-", "smp-"))


def build_adapted(name: str, num_classes: int, weights: str = "none") -> AdaptedNetwork:
    """Return such a network: ``FILE.py:FUNCTION``, ``segformer-b0`` to ``b5``, or
    ``smp-ARCHITECTURE-ENCODER``.

    Args:
        weights: ``none`` or ``imagenet``, of the encoder; the file of one's own knows its own.

    Raises:
        UserError: there is no such network, or what it needs is not installed.
    """
    if ".py:" in name:
        return _own(name, num_classes)
    kind, _, rest = name.partition("-")
    return (_segformer if kind == "segformer" else _smp)(name, rest, num_classes, weights)


def _own(name: str, num_classes: int) -> AdaptedNetwork:
    path, _, function = name.rpartition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"no file {file}; give FILE.py:FUNCTION")
    found = import_function(file, function)(num_classes)
    if not isinstance(found, AdaptedNetwork):
        raise UserError(
            f"{name} returned a {type(found).__name__}; return AdaptedNetwork(network, maps, "
            "num_classes), see docs/own-model.md"
        )
    return found


# MiT encoders: blocks per stage and widths (Xie et al. 2021, arXiv:2105.15203, table 6).
_MIT = {
    "b0": ((2, 2, 2, 2), (32, 64, 160, 256), 256),
    "b1": ((2, 2, 2, 2), (64, 128, 320, 512), 256),
    "b2": ((3, 4, 6, 3), (64, 128, 320, 512), 768),
    "b3": ((3, 4, 18, 3), (64, 128, 320, 512), 768),
    "b4": ((3, 8, 27, 3), (64, 128, 320, 512), 768),
    "b5": ((3, 6, 40, 3), (64, 128, 320, 512), 768),
}


def _segformer(name: str, size: str, num_classes: int, weights: str) -> AdaptedNetwork:
    if size not in _MIT:
        raise UserError(unknown("network", name, [f"segformer-{known}" for known in _MIT]))
    try:
        from transformers import SegformerConfig, SegformerForSemanticSegmentation
    except ImportError as error:
        raise UserError(
            f"{name} needs transformers; pip install 'kdprof[segformer]' ({error})"
        ) from error
    depths, widths, decoder = _MIT[size]
    config = SegformerConfig(
        depths=list(depths),
        hidden_sizes=list(widths),
        decoder_hidden_size=decoder,
        num_labels=num_classes,
    )
    if weights == "none":
        network = SegformerForSemanticSegmentation(config)
    else:
        source = f"nvidia/mit-{size}" if weights == "imagenet" else weights
        try:
            network = SegformerForSemanticSegmentation.from_pretrained(source, config=config)
        except Exception as error:  # the hub's errors share no narrower base class
            raise UserError(
                f"the weights {source} could not be had ({type(error).__name__}); bring the folder "
                f"huggingface.co/{source} and give its path as backbone weights"
            ) from error
    return AdaptedNetwork(network, _maps_of_segformer, num_classes, name=name)


def _maps_of_segformer(network: nn.Module, pictures: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def keep(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        found["head"] = given[0]

    hook = network.decode_head.classifier.register_forward_pre_hook(keep)
    try:
        out = network(pictures, output_hidden_states=True)
    finally:
        hook.remove()
    stages = dict(zip(("c2", "c3", "c4", "c5"), out.hidden_states, strict=True))
    return {"logits": out.logits, **found, **stages}


def _smp(name: str, rest: str, num_classes: int, weights: str) -> AdaptedNetwork:
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise UserError(
            f"{name} needs segmentation_models_pytorch; pip install 'kdprof[smp]' ({error})"
        ) from error
    architecture, _, encoder = rest.partition("-")
    known = ("unet", "unetplusplus", "manet", "linknet", "fpn", "pspnet", "pan", "deeplabv3",
             "deeplabv3plus", "upernet", "segformer")  # fmt: skip
    if architecture not in known or not encoder:
        raise UserError(unknown("network", name, [f"smp-{one}-resnet34" for one in known]))
    try:
        network = smp.create_model(
            architecture,
            encoder_name=encoder,
            encoder_weights=None if weights == "none" else weights,
            classes=num_classes,
        )
    except Exception as error:  # by encoder: KeyError, ValueError, the hub's errors
        told = " ".join(str(error).split())[:200]
        raise UserError(f"segmentation_models_pytorch cannot build {name}: {told}") from error
    return AdaptedNetwork(network, _maps_of_smp, num_classes, name=name)


def _maps_of_smp(network: nn.Module, pictures: Tensor) -> dict[str, Tensor]:
    features = network.encoder(pictures)
    head = network.decoder(features)
    stages = dict(zip(("c2", "c3", "c4", "c5"), features[-4:], strict=False))
    return {"logits": network.segmentation_head(head), "head": head, **stages}


def source_of(name: str) -> str | None:
    """Return the source file of one's own network; None of the others."""
    return re.sub(r":[^:]*$", "", name) if ".py:" in name else None
