"""Parts that many methods share: resizing to one grid, adaptors, one-hot labels, setting checks.

The other private modules hold the other shared parts; their names say which.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdprof.errors import UserError, unknown
from kdprof.method import Method, NetworkInfo


def match_grid(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the student's (N, C, h, w) map, resized bilinearly if the teacher's grid differs.

    This is kdprof's rule for networks of different output stride. The authors' codes all have equal
    grids.
    """
    if student.shape[-2:] == teacher.shape[-2:]:
        return student
    return F.interpolate(student, teacher.shape[-2:], mode="bilinear", align_corners=False)


def adaptor(student: NetworkInfo, teacher: NetworkInfo, tap: str) -> nn.Module:
    """Return a 1x1 convolution without bias to the teacher's channels, the identity if equal."""
    before, after = student.channels[tap], teacher.channels[tap]
    return nn.Identity() if before == after else nn.Conv2d(before, after, 1, bias=False)


def membership(labels: Tensor, grid: torch.Size, num_classes: int) -> Tensor:
    """Return one-hot labels, (N, h w, K) float32, after a nearest resize to the grid.

    The row of a void position is all 0.
    """
    nearest = F.interpolate(labels[:, None].float(), grid, mode="nearest").flatten(1)
    return (nearest[:, :, None] == torch.arange(num_classes, device=labels.device)).float()


def grouped(values: Tensor, group: int) -> Tensor:
    """Return (N, ...) as (groups, ``group``, ...), a view."""
    return values.unflatten(0, (-1, group))


class GroupedMethod(Method):
    """A method whose objective couples the images of a device: it compares them with each other, or
    divides by a sum over them.

    Most of these were trained with a few images on each of several devices; on one device with the
    whole batch they are other objectives. With ``images_per_group`` = n a term that couples images
    is computed for n images at a time and averaged over the groups. Memories of earlier images are
    shared by all groups. The subclass asks :meth:`group_size`.
    """

    images_per_group: int = 0

    def __init__(self, **settings):
        super().__init__(**settings)
        if self.images_per_group < 0:
            raise UserError(
                f"method '{self.name}': images_per_group must be 0 (all images of a device) or "
                f"more, not {self.images_per_group}"
            )
        if self.images_per_group:
            self.notes.append(
                f"images_per_group = {self.images_per_group}: the objective of {self.name} couples "
                "the images of a group only, as on a device with so many images"
            )

    def check_images(self, images: int) -> None:
        """Refuse numbers of images that ``images_per_group`` does not divide."""
        if self.images_per_group and images % self.images_per_group:
            raise UserError(
                f"method '{self.name}': images_per_group = {self.images_per_group} must divide the "
                f"{images} images of a device; use another one, or another batch"
            )

    def group_size(self, images: int) -> int:
        """Return how many images form a group, of ``images`` on this device.

        Raises:
            UserError: the groups cannot have equal size.
        """
        self.check_images(images)
        return self.images_per_group or images


def check_settings(
    method: Method,
    choices: Mapping[str, Collection[str]] | None = None,
    positive: Collection[str] = (),
) -> None:
    """Check the settings of a method.

    Args:
        choices: the allowed values of a setting, by its name.
        positive: names of the settings that must be above 0.

    Raises:
        UserError: at least one setting has a value that is not allowed. It names all of them.
    """
    problems = [
        f"method '{method.name}': {unknown(name, getattr(method, name), valid)}"
        for name, valid in (choices or {}).items()
        if getattr(method, name) not in valid
    ]
    problems += [
        f"method '{method.name}': {name} must be above 0, not {getattr(method, name)!r}"
        for name in positive
        if not getattr(method, name) > 0
    ]
    if problems:
        raise UserError(*problems)
