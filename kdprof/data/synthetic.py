"""Synthetic street scenes, drawn from (seed, split, index) alone, to try kdprof without a data set.

A pinhole camera 1.5 m above a road looks along it. Objects have sizes in metres and stand at random
depths, so many of them are far and small. Colours are drawn for each object and overlap between
classes (a car may have the grey of the road, a wall the blue of the sky). The classes differ in
shape, texture and place, which a larger network recognises better. "sign" includes traffic lights.
The bonnet of the camera's car and the edge of the frame are void.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from kdprof.data.base import Classes, DataOnDisk
from kdprof.data.random_streams import Stream, generator
from kdprof.method import IGNORE

_COLOURS: tuple[tuple[str, tuple[int, int, int]], ...] = (
    ("sky", (70, 130, 180)),
    ("building", (70, 70, 70)),
    ("road", (128, 64, 128)),
    ("pavement", (244, 35, 232)),
    ("vegetation", (107, 142, 35)),
    ("terrain", (152, 251, 152)),
    ("pole", (153, 153, 153)),
    ("sign", (220, 220, 0)),
    ("fence", (190, 153, 153)),
    ("car", (0, 0, 142)),
    ("person", (220, 20, 60)),
    ("cyclist", (119, 11, 32)),
)
CLASSES = Classes(tuple(n for n, _ in _COLOURS), tuple(colour for _, colour in _COLOURS))
_ID = {name: index for index, name in enumerate(CLASSES.names)}
_SPLITS = ("train", "val", "test")

CAMERA_HEIGHT = 1.5
NEAR, FAR = 4.0, 60.0
"""The range of depths of objects, in metres."""
_ROUGHNESS = np.array(
    [0.01, 0.05, 0.05, 0.07, 0.22, 0.14, 0.03, 0.03, 0.12, 0.03, 0.06, 0.08], dtype=np.float32
)
"""Amplitude of each class's texture, in units of full brightness."""

Colour = tuple[int, int, int]
Point = tuple[float, float]


def _colour(values: Iterable[float]) -> Colour:
    """Return three values, 0 to 255, as a colour."""
    red, green, blue = (int(value) for value in values)
    return red, green, blue


class SyntheticScenes(DataOnDisk):
    """``count`` scenes of one split. Images are (3, H, W), labels (H, W), see CLASSES."""

    def __init__(self, split: str, size: tuple[int, int], count: int, seed: int = 0):
        super().__init__("synthetic", split, CLASSES)
        self._size, self.count, self.seed = size, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self._scene(index).render()
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(label)

    def label(self, index: int) -> Tensor:
        """Return the label (H, W) of an image."""
        return torch.from_numpy(self._scene(index).label())

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width of an image, pixels."""
        return self._size

    def identity(self) -> list[Any]:
        """Return what the scenes depend on."""
        return [self.split, list(self._size), self.count, self.seed]

    def _scene(self, index: int) -> _Scene:
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng = generator(Stream.SCENE, self.seed, _SPLITS.index(self.split), index)
        return _Scene(rng, self._size)


class _Scene:
    """One scene: an image and a label canvas that are always painted together, back to front."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        self.rng = rng
        self.height, self.width = size
        self.focal = self.width * rng.uniform(0.7, 1.1)
        self.horizon = self.height * rng.uniform(0.35, 0.52)
        self.centre = self.width * rng.uniform(0.3, 0.7)
        self.road = rng.uniform(3.0, 6.0)
        self.pavement = self.road + rng.uniform(1.5, 4.5)
        self.verge = self.pavement + rng.uniform(0.5, 8.0)
        self._image = Image.new("RGB", (self.width, self.height))
        self._label = Image.new("L", (self.width, self.height), _ID["sky"])
        self._paint, self._tag = ImageDraw.Draw(self._image), ImageDraw.Draw(self._label)

    def render(self) -> tuple[np.ndarray, np.ndarray]:
        """Paint everything and return (image, label)."""
        label = self._paint_all()
        image = self._photograph(label)
        self._mark_void(label)
        return image, label

    def label(self) -> np.ndarray:
        """Paint everything and return the label, without taking the photograph."""
        label = self._paint_all()
        self._mark_void(label)
        return label

    def _paint_all(self) -> np.ndarray:
        self._sky()
        self._ground()
        self._street_end()
        for side in (-1, 1):
            self._street_front(side)
        self._shadows()
        self._objects()
        self._bonnet()
        return np.asarray(self._label).copy()

    # Geometry and paint

    def _project(self, across: float, up: float, depth: float) -> Point:
        """Return the pixel of a point (metres right of the camera, above ground, ahead)."""
        return (
            self.centre + self.focal * across / depth,
            self.horizon + self.focal * (CAMERA_HEIGHT - up) / depth,
        )

    def _polygon(self, points: list[Point], name: str, colour: Colour) -> None:
        self._paint.polygon(points, fill=colour)
        self._tag.polygon(points, fill=_ID[name])

    def _ellipse(self, centre: Point, radius: Point, name: str, colour: Colour) -> None:
        box = [
            (centre[0] - radius[0], centre[1] - radius[1]),
            (centre[0] + radius[0], centre[1] + radius[1]),
        ]
        self._paint.ellipse(box, fill=colour)
        self._tag.ellipse(box, fill=_ID[name])

    def _upright(
        self, across: float, depth: float, size: Point, up: float, name: str, colour: Colour
    ) -> None:
        """Paint a rectangle (width, height in metres) that faces the camera."""
        half = size[0] / 2
        low, high = (
            self._project(across - half, up, depth),
            self._project(across + half, up + size[1], depth),
        )
        # At least one pixel wide: a far pole is thin, not gone.
        right = max(high[0], low[0] + 1)
        self._polygon([low, (right, low[1]), (right, high[1]), (low[0], high[1])], name, colour)

    def _any_colour(self) -> Colour:
        return _colour(self.rng.integers(20, 236, 3))

    def _muted(self) -> Colour:
        """Return a colour of brick, plaster, car paint or cloth: any hue, rarely a pure one."""
        colour = self.rng.integers(20, 236, 3)
        colour = colour.mean() + self.rng.uniform(0.1, 0.8) * (colour - colour.mean())
        return _colour(colour)

    def _grey(self, low: int = 60, high: int = 190, tint: int = 18) -> Colour:
        base = self.rng.integers(low, high)
        return _colour(np.clip(base + self.rng.integers(-tint, tint + 1, 3), 0, 255))

    def _green(self) -> Colour:
        return (
            int(self.rng.integers(30, 120)),
            int(self.rng.integers(60, 150)),
            int(self.rng.integers(10, 80)),
        )

    # The parts of a street

    def _sky(self) -> None:
        overcast = self.rng.random() < 0.5
        top = self._grey(130, 240) if overcast else (90, 140, int(self.rng.integers(180, 250)))
        low = self._grey(170, 250, 10)
        ramp = np.linspace(0, 1, self.height, dtype=np.float32)[:, None, None]
        sky = np.array(top) * (1 - ramp) + np.array(low) * ramp
        rows = np.broadcast_to(sky, (self.height, self.width, 3)).astype(np.uint8)
        self._image.paste(Image.fromarray(np.ascontiguousarray(rows)))

    def _ground(self) -> None:
        horizon = self._project(0, 0, 4 * FAR)[1]
        left, right = (0.0, self.width)
        bottom = [(left, horizon), (right, horizon), (right, self.height), (left, self.height)]
        outside = "terrain" if self.rng.random() < 0.7 else "pavement"
        self._polygon(bottom, outside, self._green() if outside == "terrain" else self._grey())
        self._strip(-self.pavement, self.pavement, "pavement", self._grey(80, 200))
        self._strip(-self.road, self.road, "road", self._grey(50, 140, 10))
        if self.rng.random() < 0.7:
            self._lane_marks()
        if self.rng.random() < 0.25:
            self._crossing()

    def _strip(
        self, left: float, right: float, name: str, colour: Colour, near: float = 1.0
    ) -> None:
        points = [(left, near), (left, 4 * FAR), (right, 4 * FAR), (right, near)]
        self._polygon([self._project(x, 0, d) for x, d in points], name, colour)

    def _lane_marks(self) -> None:
        paint = self._grey(180, 250)
        across = self.rng.uniform(-1, 1)
        for depth in np.arange(2.0, FAR, 6.0):
            corners = [
                (across - 0.08, depth),
                (across - 0.08, depth + 3),
                (across + 0.08, depth + 3),
                (across + 0.08, depth),
            ]
            self._polygon([self._project(x, 0, d) for x, d in corners], "road", paint)

    def _crossing(self) -> None:
        paint, near = self._grey(170, 250), self.rng.uniform(5, 20)
        for across in np.arange(-self.road, self.road - 0.5, 1.0):
            corners = [(across, near), (across, near + 3), (across + 0.5, near + 3)]
            corners.append((across + 0.5, near))
            self._polygon([self._project(x, 0, d) for x, d in corners], "road", paint)

    def _street_end(self) -> None:
        """Close the street, in half of the scenes, with houses or trees across it."""
        if self.rng.random() < 0.5:
            return
        leafy = self.rng.random() < 0.5
        for across in np.arange(-60, 60, self.rng.uniform(8, 16)):
            size = (18.0, self.rng.uniform(4, 14))
            name, colour = ("vegetation", self._green()) if leafy else ("building", self._muted())
            self._upright(across, 1.8 * FAR, size, 0, name, colour)

    def _street_front(self, side: int) -> None:
        """Paint buildings, gaps with trees, and fences along one side, from far to near."""
        depths = [NEAR * 0.6]
        while depths[-1] < 2 * FAR:
            depths.append(depths[-1] + self.rng.uniform(5, 18))
        for near, far in reversed(list(pairwise(depths))):
            kind = self.rng.random()
            if kind < 0.62:
                self._building(side, near, far)
            elif kind < 0.85:
                self._trees(side, near, far)
            barrier = self.rng.random()
            if barrier < 0.3:
                self._fence(side, near, far)
            elif barrier < 0.45:
                self._along("vegetation", side * (self.verge - 0.3), near, far, self._green())

    def _building(self, side: int, near: float, far: float) -> None:
        across = side * (self.verge + self.rng.uniform(0, 3))
        height = self.rng.uniform(4, 18)
        wall = self._muted()
        end = self._project(across + side * 20, 0, near)[0]
        # The side that faces the camera, then the front along the street.
        low, high = self._project(across, 0, near), self._project(across, height, near)
        shade = _colour(0.8 * v for v in wall)
        self._polygon([low, high, (end, high[1]), (end, low[1])], "building", shade)
        self._along("building", across, near, far, wall, height)
        if self.rng.random() < 0.4:  # a shop on the ground floor
            self._along("building", across, near, far, self._muted(), 3.0)
        self._windows(across, near, far, height)

    def _windows(self, across: float, near: float, far: float, height: float) -> None:
        glass = self._grey(20, 230, 30)
        for up in np.arange(1.2, height - 1.5, 3.0):
            for depth in np.arange(near + 0.8, far - 1.2, 2.6):
                quad = [(up, depth), (up + 1.5, depth), (up + 1.5, depth + 1.2), (up, depth + 1.2)]
                self._polygon([self._project(across, u, d) for u, d in quad], "building", glass)

    def _trees(self, side: int, near: float, far: float) -> None:
        for depth in sorted(self.rng.uniform(near, far, self.rng.integers(1, 4)), reverse=True):
            across = side * (self.verge + self.rng.uniform(-0.5, 4))
            height = self.rng.uniform(3, 9)
            self._upright(across, depth, (0.35, height * 0.6), 0, "vegetation", (80, 60, 40))
            leaves = np.array(self._green())
            for light in np.linspace(0.65, 1.15, 7):
                centre = self._project(
                    across + self.rng.normal(0, 0.2 * height),
                    height * self.rng.uniform(0.45, 1),
                    depth,
                )
                radius = self.focal / depth * height * self.rng.uniform(0.12, 0.28)
                shade = _colour(light * leaves)
                self._ellipse(centre, (radius, 0.9 * radius), "vegetation", shade)

    def _along(
        self, name: str, across: float, near: float, far: float, colour: Colour, height: float = 1.0
    ) -> None:
        """Paint a wall along the street."""
        quad = [(0.0, near), (height, near), (height, far), (0.0, far)]
        self._polygon([self._project(across, u, d) for u, d in quad], name, colour)

    def _fence(self, side: int, near: float, far: float) -> None:
        across, height = side * (self.verge - 0.2), self.rng.uniform(0.8, 1.6)
        colour = self._grey() if self.rng.random() < 0.5 else self._muted()
        self._along("fence", across, near, far, colour, height)
        dark = tuple(v // 2 for v in colour)
        for depth in np.arange(near, far, 0.7):
            ends = [self._project(across, 0, depth), self._project(across, height, depth)]
            self._paint.line(ends, fill=dark)

    def _shadows(self) -> None:
        """Darken patches of the ground: edges that are in the image but not in the label."""
        shadow = Image.new("L", self._image.size, 0)
        draw = ImageDraw.Draw(shadow)
        for _ in range(self.rng.integers(0, 4)):
            depth, across = self.rng.uniform(3, 25), self.rng.uniform(-8, 8)
            spread, length = self.rng.uniform(1, 5), self.rng.uniform(1, 8)
            corners = [(across, depth), (across + spread, depth), (across, depth + length)]
            draw.polygon([self._project(x, 0, d) for x, d in corners], fill=120)
        black = Image.new("RGB", self._image.size)
        self._image.paste(black, mask=shadow)
        self._paint = ImageDraw.Draw(self._image)

    def _objects(self) -> None:
        """Paint cars, people, cyclists, poles and signs, from far to near."""
        makers = (
            [self._car] * self.rng.integers(1, 7)
            + [self._person] * self.rng.integers(0, 7)
            + [self._cyclist] * self.rng.integers(0, 3)
            + [self._pole] * self.rng.integers(2, 7)
        )
        # Uniform in 1 / depth: near and far objects are equally frequent in the image, not on the
        # map.
        depths = 1 / self.rng.uniform(1 / FAR, 1 / NEAR, len(makers))
        for place in np.argsort(-depths):
            makers[place](float(depths[place]))

    def _car(self, depth: float) -> None:
        """Paint a car or van from behind or the front, or (one in four) from the side."""
        across = self.rng.choice([-1, 1]) * self.rng.uniform(0.25, 0.85) * self.road
        aside = self.rng.random() < 0.25
        width = self.rng.uniform(3.6, 5.0) if aside else self.rng.uniform(1.6, 2.2)
        height = self.rng.uniform(1.3, 2.6)
        self._under(across, depth, width, wheel=0.32 if aside else 0.18)
        body = self._grey(20, 240) if self.rng.random() < 0.5 else self._muted()
        glass = self._grey(20, 200, 20)
        self._upright(across, depth, (width, 0.5 * height), 0.25, "car", body)
        roof, pane = (0.6, 0.52) if aside else (0.78, 0.66)
        self._upright(across, depth, (roof * width, 0.5 * height), 0.4 * height, "car", body)
        up = 0.55 * height
        self._upright(across, depth, (pane * width, 0.28 * height), up, "car", glass)
        for end in (-0.4, 0.4):
            lamp = (0.2, 0.15)
            self._upright(across + end * width, depth, lamp, 0.6, "car", self._any_colour())

    def _under(self, across: float, depth: float, width: float, wheel: float) -> None:
        """Paint the shadow under a car, which is labelled road, and its wheels, labelled car."""
        dark = self._grey(5, 45, 4)
        x, y = self._project(across, 0.05, depth)
        scale = self.focal / depth
        box = [(x - 0.55 * width * scale, y - 0.15 * scale)]
        box.append((x + 0.55 * width * scale, y + 0.15 * scale))
        self._paint.ellipse(box, fill=dark)
        for end in (-0.36, 0.36):
            hub = self._project(across + end * width, 0.3, depth)
            self._ellipse(hub, (wheel * scale, 0.32 * scale), "car", dark)

    def _person(self, depth: float, name: str = "person", up: float = 0.0) -> None:
        across = self.rng.choice([-1, 1]) * self.rng.uniform(0.3, 1.1) * self.pavement
        self._figure(across, depth, name, up)

    def _figure(self, across: float, depth: float, name: str, up: float) -> None:
        height, trousers = self.rng.uniform(1.2, 1.9), self._muted()
        for leg in (-0.1, 0.1):
            size = (0.14, 0.48 * height)
            self._upright(across + leg, depth, size, up, name, trousers)
        coat = self._any_colour() if self.rng.random() < 0.3 else self._muted()
        self._upright(across, depth, (0.48, 0.4 * height), up + 0.45 * height, name, coat)
        head = self._project(across, up + 0.92 * height, depth)
        radius = max(0.6, 0.12 * self.focal / depth)
        skin = (int(self.rng.integers(90, 230)), int(self.rng.integers(70, 180)), 90)
        self._ellipse(head, (radius, 1.2 * radius), name, skin)

    def _cyclist(self, depth: float) -> None:
        across = self.rng.choice([-1, 1]) * self.rng.uniform(0.5, 1.0) * self.road
        wheel = 0.34 * self.focal / depth
        for offset in (-0.5, 0.5):
            hub = self._project(across + offset, 0.34, depth)
            self._ellipse(hub, (wheel, wheel), "cyclist", self._grey(10, 90, 5))
        self._upright(across, depth, (1.0, 0.1), 0.6, "cyclist", self._any_colour())
        self._figure(across, depth, "cyclist", 0.5)

    def _pole(self, depth: float) -> None:
        across = self.rng.choice([-1, 1]) * self.rng.uniform(1.02, 1.25) * self.road
        height = self.rng.uniform(2.2, 7)
        self._upright(across, depth, (0.14, height), 0, "pole", self._grey(40, 220))
        if self.rng.random() < 0.65:
            up = self.rng.uniform(0.7, 0.95) * height
            signs = (self._board, self._disc, self._traffic_light)
            signs[self.rng.integers(len(signs))](across, depth, up)

    def _board(self, across: float, depth: float, up: float) -> None:
        size = self.rng.uniform(0.5, 1.0)
        self._upright(across, depth, (size, size), up, "sign", self._any_colour())

    def _disc(self, across: float, depth: float, up: float) -> None:
        radius = max(1.0, self.rng.uniform(0.25, 0.5) * self.focal / depth)
        centre = self._project(across, up, depth)
        self._ellipse(centre, (radius, radius), "sign", self._any_colour())
        self._ellipse(centre, (0.6 * radius, 0.6 * radius), "sign", self._grey(150, 250))

    def _traffic_light(self, across: float, depth: float, up: float) -> None:
        self._upright(across, depth, (0.4, 1.1), up, "sign", self._grey(10, 60, 5))
        lit = int(self.rng.integers(3))
        colour = ((60, 240, 120), (250, 190, 40), (250, 50, 40))[lit]
        self._upright(across, depth, (0.25, 0.28), up + 0.06 + 0.35 * lit, "sign", colour)

    def _bonnet(self) -> None:
        """Paint the bonnet of the camera's car, in most scenes, and store its outline."""
        x = (np.arange(self.width) / self.width - 0.5) / 0.6
        share = self.rng.uniform(0.04, 0.12) if self.rng.random() < 0.6 else 0.0
        self.bonnet = self.height * (1 - share * (1 - x**2).clip(0))
        if share:
            outline = [(0, self.height), *enumerate(self.bonnet), (self.width, self.height)]
            self._paint.polygon([(x, float(y)) for x, y in outline], fill=self._grey(15, 120))

    # The camera

    def _photograph(self, label: np.ndarray) -> np.ndarray:
        """Return the image with texture, haze, light and sensor noise, uint8 (H, W, 3)."""
        rng, size = self.rng, (self.height, self.width)
        image = np.asarray(self._image, dtype=np.float32) / 255
        texture = rng.standard_normal(size, dtype=np.float32) + 1.5 * self._blobs(6)
        clouds = self._blobs(max(1, self.width // 8)) * np.float32(0.12) * (label == _ID["sky"])
        image += (_ROUGHNESS[label] * texture + clouds)[..., None] * rng.uniform(0.3, 1)
        haze = rng.uniform(0, 0.5) * np.exp(
            -np.abs(np.arange(self.height) - self.horizon) / (0.15 * self.height)
        )
        image += (haze[:, None, None] * (0.75 - image)).astype(np.float32)
        light = 1 + 0.35 * rng.uniform(-1, 1) * np.linspace(-1, 1, self.width, dtype=np.float32)
        gain = rng.uniform(0.25, 0.6) if rng.random() < 0.2 else rng.uniform(0.65, 1.25)
        cast = rng.uniform(0.9, 1.1, 3).astype(np.float32)
        image = image * light[None, :, None] * (gain * cast)
        image += rng.normal(0, rng.uniform(0.01, 0.05), (*size, 3)).astype(np.float32)
        sharp = Image.fromarray((image.clip(0, 1) * 255).astype(np.uint8))
        blur = rng.uniform(0, 0.7) * self.width / 240
        return np.array(sharp.filter(ImageFilter.GaussianBlur(blur)))

    def _blobs(self, cell: int) -> np.ndarray:
        """Return smooth noise with blobs of about ``cell`` pixels."""
        coarse = self.rng.standard_normal(
            (self.height // cell + 2, self.width // cell + 2), dtype=np.float32
        )
        smooth = Image.fromarray(coarse).resize((self.width, self.height), Image.Resampling.BICUBIC)
        return np.asarray(smooth)

    def _mark_void(self, label: np.ndarray) -> None:
        """Mark the bonnet and the edge of the frame as void, as real data sets do."""
        edge = self.width // 80
        label[:, :edge] = label[:, self.width - edge :] = IGNORE
        label[np.arange(self.height)[:, None] >= self.bonnet[None]] = IGNORE
