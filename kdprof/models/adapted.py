"""Networks that are not kdprof's: a user's file, SegFormer, segmentation_models.pytorch."""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from kdprof.errors import UserError, some, unknown
from kdprof.imports import quick_import
from kdprof.method import FEATURE_TAPS, Network, NetworkInfo, Taps
from kdprof.models.network import Preprocessing
from kdprof.user_files import (
    NamedInFile,
    following,
    import_file,
    import_function,
    named_in_file,
    sources_of,
    version_of,
)

with quick_import():
    import timm

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
IMAGENET = Preprocessing(IMAGENET_MEAN, IMAGENET_STD)
PROBE = 128
"""Height and width of the image with which channels and strides are determined."""
REASON = 160
"""Characters of a network's own message in an error."""

RGB = tuple[float, float, float]
"""A number for each channel of an image."""
Maps = Callable[[nn.Module, Tensor], Mapping[str, Tensor]]
"""A function that returns the taps of a network, each (N, C, h, w), for normalised images (N, 3, H,
W)."""


class AdaptedNetwork(Network):
    """Any network, with the attributes that kdprof needs.

    Args:
        module: the network.
        maps: returns its taps: at least ``logits``; also ``head`` (input of the classifier),
            ``aux`` (auxiliary logits) and ``c2`` to ``c5`` if it has them. All are computed in
            every step, even if the method reads only some of them.
        num_classes: channels of the logits.
        mean, std: normalisation of its images, per RGB channel in 0..255; std above 0.
        align_corners: bilinear mode in which its logits are resized.
        heads: names of the submodules of ``module`` behind the backbone, for studies that set a
            learning rate or a weight decay for the head.
        name: its name in records.

    Raises:
        UserError: ``maps`` returns no mapping of tensors (N, C, h, w), an unknown tap, no logits,
            or logits with another number of classes; mean or std are no three such numbers; or a
            head is no submodule.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        module: nn.Module,
        maps: Maps,
        num_classes: int,
        *,
        mean: RGB = IMAGENET_MEAN,
        std: RGB = IMAGENET_STD,
        align_corners: bool = False,
        heads: Collection[str] = (),
        name: str = "own",
    ):
        super().__init__()
        submodules = [path for path, _ in module.named_modules() if path]
        if wrong := [head for head in heads if head not in submodules]:
            raise UserError(f"{name}: {unknown('head', wrong[0], submodules)}")
        self.heads = tuple(f"module.{head}" for head in heads)
        self.module, self.maps, self.align_corners = module, maps, align_corners
        mean, std = _three(name, "mean", mean), _three(name, "std", std)
        _check_normalisation(name, mean, std)
        self.preprocessing = Preprocessing(mean, std)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.info = self._inspect(name, num_classes)

    def forward(self, images: Tensor, taps: Collection[str]) -> Taps:
        """Return exactly the taps in ``taps``; ``images`` are RGB (N, 3, H, W) in 0..255.

        Raises:
            UserError: the network does not have one of these taps.
        """
        found = self.maps(self.module, (images - self.mean) / self.std)
        for tap in taps:
            if tap not in found:
                raise UserError(
                    f"{self.info.name} has no tap '{tap}'; it has {', '.join(sorted(found))}"
                )
        return Taps(**{tap: found[tap] for tap in taps})

    def check_input(self, batch: int, crop: tuple[int, int], training: bool) -> str | None:
        """Return in one line why this network cannot take images of a size; None if it can, or if
        torch cannot tell it from the shapes of the tensors alone.

        Nothing is computed: tensors have shapes, but no values.
        """
        refused = self._refusal(crop)
        if refused is None or self._refusal((PROBE, PROBE)) is not None:
            return None
        return (
            f"{self.info.name} cannot take images of {crop[0]}x{crop[1]} "
            f"({_short(refused)}); use another size or network"
        )

    @torch.no_grad()
    def _refusal(self, size: tuple[int, int]) -> str | None:
        """Return the message of the error that images of a size cause in evaluation."""
        training = self.module.training
        try:
            with _quiet(), FakeTensorMode(allow_non_fake_inputs=True), self.mean.device:
                self.maps(self.module.eval(), torch.zeros(1, 3, *size))
        except Exception as error:  # by network: RuntimeError, AssertionError, ValueError, ...
            return str(error)
        finally:
            self.module.train(training)
        return None

    @torch.no_grad()
    def _inspect(self, name: str, num_classes: int) -> NetworkInfo:
        """Return channels and strides, which are read from the maps of one small image."""
        training = self.module.training
        found = self.maps(self.module.eval(), torch.zeros(1, 3, PROBE, PROBE))
        self.module.train(training)
        _check_maps(name, found)
        if found["logits"].shape[1] != num_classes:
            raise UserError(
                f"{name}: its logits have {found['logits'].shape[1]} channels for {num_classes} "
                "classes; build it with the classes it is given"
            )
        channels = {tap: value.shape[1] for tap, value in found.items()}
        stride = {tap: round(PROBE / value.shape[-1]) for tap, value in found.items()}
        return NetworkInfo(name, num_classes, channels, stride)


def _three(name: str, what: str, given: Iterable[float]) -> RGB:
    try:
        red, green, blue = map(float, given)
    except (TypeError, ValueError):
        red = green = blue = math.nan
    if not all(map(math.isfinite, (red, green, blue))):
        raise UserError(
            f"{name}: {what} = {given}; give three finite numbers, for red, green, blue"
        )
    return red, green, blue


def _check_normalisation(name: str, mean: RGB, std: RGB) -> None:
    if min(std) <= 0:
        raise UserError(f"{name}: std = {std}; images are divided by it, so give numbers above 0")
    if max(std) < 1 or (min(mean) > 0 and max(mean) < 1 and std != (1, 1, 1)):
        raise UserError(
            f"{name}: mean = {mean}, std = {std}, but images are in 0..255: multiply numbers for "
            "0..1 by 255"
        )


def _check_maps(name: str, found: object) -> None:
    """Check the types and names of what a network's maps return."""
    if not isinstance(found, Mapping):
        raise UserError(
            f"{name}: its maps are a {type(found).__name__}; return a dict of tensors by the names "
            f"{', '.join(FEATURE_TAPS)}"
        )
    for tap, value in found.items():
        if tap not in FEATURE_TAPS:
            raise UserError(f"{name}: {unknown('tap', str(tap), FEATURE_TAPS)}")
        if not isinstance(value, Tensor) or value.ndim != 4:
            shape = f" {tuple(value.shape)}" if isinstance(value, Tensor) else ""
            raise UserError(
                f"{name}: its map '{tap}' is a {type(value).__name__}{shape}; return a Tensor "
                "(N, C, h, w)"
            )
    if "logits" not in found:
        raise UserError(f"{name}: its maps hold no 'logits', only {', '.join(found) or 'nothing'}")


def _short(error: object) -> str:
    return " ".join(str(error).split())[:REASON]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from printing the traceback of an operator that refuses its shapes."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def is_adapted(name: str) -> bool:
    """Return whether a name belongs to an adapted network."""
    return is_from_file(name) or name.startswith(("segformer-", "smp-"))


def is_from_file(name: object) -> bool:
    """Return whether a name is that of a network in a user's file: ``FILE.py:FUNCTION``."""
    return _named(name) is not None


def _named(name: object) -> NamedInFile | None:
    own = named_in_file(str(name))
    return own if own and own.name else None


def build_adapted(name: str, num_classes: int, weights: str = "none") -> AdaptedNetwork:
    """Return an adapted network: ``FILE.py:FUNCTION``, ``segformer-b0`` to ``b5``, or
    ``smp-ARCHITECTURE-ENCODER``.

    Args:
        weights: ``none`` or ``imagenet``, for the encoder; a user's file loads its weights itself.

    Raises:
        UserError: the network does not exist, or a package that it needs is not installed.
    """
    if (own := _named(name)) is not None:
        return _from_file(name, own, num_classes)
    kind, _, rest = name.partition("-")
    return (_segformer if kind == "segformer" else _smp)(name, rest, num_classes, weights)


def _from_file(name: str, own: NamedInFile, num_classes: int) -> AdaptedNetwork:
    own.check_exists(f"network {name}")
    build = import_function(*own)
    try:
        with following(own.path):
            found = build(num_classes)
    except UserError:
        raise
    except Exception as error:  # the user's code: any
        raise UserError(
            f"{name} cannot be built: {type(error).__name__}: {_short(error) or 'no message'} "
            f"({_line_in(own.path, error)})"
        ) from error
    if not isinstance(found, AdaptedNetwork):
        raise UserError(
            f"{name} returned a {type(found).__name__}; return AdaptedNetwork(network, maps, "
            "num_classes), see docs/own-model.md"
        )
    return found


def _line_in(path: Path, error: Exception) -> str:
    """Return ``FILE:line`` of the innermost line of a user's file that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if Path(f.filename) == path.resolve()]
    return f"{path}:{lines[-1]}" if lines else str(path)


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
        depths=list(depths), hidden_sizes=list(widths), decoder_hidden_size=decoder
    )
    config.num_labels = num_classes
    if weights == "none":
        network = SegformerForSemanticSegmentation(config)
    else:
        source = f"nvidia/mit-{size}" if weights == "imagenet" else weights
        try:
            loaded: Any = SegformerForSemanticSegmentation.from_pretrained(
                source, config=config, output_loading_info=True
            )
            network, told = loaded
        except Exception as error:  # the hub's errors share no narrower base class
            raise UserError(
                f"the weights {source} could not be loaded ({type(error).__name__}); get the "
                f"folder huggingface.co/{source} and give its path as backbone weights"
            ) from error
        lacking = [key for key in told["missing_keys"] if not key.startswith("decode_head.")]
        if lacking:  # they would be random, without a word
            raise UserError(
                f"{source} lacks {len(lacking)} entries of the encoder of {name} "
                f"({some(lacking)}); give the folder of its ImageNet weights"
            )
    heads = ("decode_head",)
    return AdaptedNetwork(network, _maps_of_segformer, num_classes, heads=heads, name=name)


def _maps_of_segformer(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def keep(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        found["head"] = given[0]

    classifier = network.get_submodule("decode_head.classifier")
    hook = classifier.register_forward_pre_hook(keep)
    try:
        out = network(images, output_hidden_states=True)
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
    mean, std = _normalisation_of_smp(smp, name, encoder, weights)
    heads = ("decoder", "segmentation_head")
    try:
        network = smp.create_model(
            architecture,
            encoder_name=encoder,
            encoder_weights=None if weights == "none" else weights,
            classes=num_classes,
        )
        return AdaptedNetwork(
            network, _maps_of_smp, num_classes, mean=mean, std=std, heads=heads, name=name
        )
    except Exception as error:  # by encoder: KeyError, ValueError, RuntimeError, the hub's errors
        raise UserError(
            f"segmentation_models_pytorch cannot build {name}: {_short(error)}"
        ) from error


def _normalisation_of_smp(smp: Any, name: str, encoder: str, weights: str) -> tuple[RGB, RGB]:
    """Return mean and std of an encoder's images, per RGB channel in 0..255.

    They depend on its name alone, because a network that was trained is built again without
    weights: of a ``tu-`` encoder they are timm's for its weights, of the others ImageNet's.

    Raises:
        UserError: the weights need another normalisation, or one that is not known.
    """
    universal = encoder.startswith("tu-")
    if weights == "none" and not (universal and timm.is_model_pretrained(encoder[3:])):
        return IMAGENET_MEAN, IMAGENET_STD
    if universal and weights not in ("none", "imagenet"):
        raise UserError(f"{name}: the backbone weights of a tu- encoder are none or imagenet")
    given = "imagenet" if weights == "none" else weights
    try:
        told = smp.encoders.get_preprocessing_params(encoder, given)
        factor = {1: 255, 255: 1}[told["input_range"][1]]
        mean, std = (tuple(factor * value for value in told[key]) for key in ("mean", "std"))
    except Exception as error:  # by encoder: KeyError, ValueError, the hub's errors
        raise UserError(
            f"{name}: the normalisation of the weights '{given}' is not known "
            f"({type(error).__name__}: {_short(error)}); take another encoder, or weights none"
        ) from error
    rgb = told["input_space"] == "RGB"
    if rgb and Preprocessing(mean, std).agrees(IMAGENET):
        return IMAGENET_MEAN, IMAGENET_STD
    if rgb and universal:
        return mean, std
    raise UserError(
        f"{name}: its weights '{given}' need {told['input_space']} images of mean {mean} and std "
        f"{std}, not ImageNet's; take a tu- encoder, or write a file that builds the network with "
        "these (docs/own-model.md)"
    )


def _maps_of_smp(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    encoder, decoder, classifier = (
        network.get_submodule(part) for part in ("encoder", "decoder", "segmentation_head")
    )
    features = encoder(images)
    head = decoder(features)
    # Before c2, at stride 4, come the image and a map of half its size. PSPNet's end with c3.
    stages = dict(zip(("c2", "c3", "c4", "c5"), features[2:], strict=False))
    return {"logits": classifier(head), "head": head, **stages}


def sources_of_network(name: object) -> dict[str, str]:
    """Return the hashes of the files that a user's network depends on, by name; of another adapted
    network the version of its package, and nothing of kdprof's own.

    The network must have been built before: it may read files while it is.
    """
    if (own := _named(name)) is not None:
        return sources_of(import_file(own.path))
    packages = {"segformer": "transformers", "smp": "segmentation_models_pytorch"}
    package = packages.get(str(name).partition("-")[0])
    return {f"version of {package}": version_of(package) or "none"} if package else {}
