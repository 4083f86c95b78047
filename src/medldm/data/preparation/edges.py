"""Edge conditions: an eight-step detector, and degradations that teach a model to follow rough sketches.

The detector's steps are those of the cardiac system (github.com/tonyyunyang/ldm-medical-image), written anew.
A binary edge map is never resized: the image is resized first, and edges are detected after.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import cv2
import numpy as np

from medldm.bounds import check_number
from medldm.errors import InputError

SOURCES = ("image", "labels", "both")
EIGHT = 8  # connectivity
# What the steps take: OpenCV ends the process, or runs for hours, beyond some of these.
RANGES: dict[str, tuple[float, float, bool]] = {
    "bilateral_diameter": (1, 99, True),
    "bilateral_sigma_color": (0, 10_000, False),
    "bilateral_sigma_space": (0, 10_000, False),
    "clahe_clip": (0, 10_000, False),
    "clahe_tiles": (1, 64, True),
    "dark_threshold": (0, 255, False),
    "min_length": (0, 2**31, True),
    "blur": (0, 256, False),
}


@dataclass(frozen=True)
class EdgeRecipe:
    """Parameters of `detect_edges`. The defaults of `bilateral_diameter` to `aperture` are those of the
    published code; the others are additions and change nothing by default.

    Lengths are in pixels, intensities in grey levels 0..255. `thresholds` fixes (lower, upper) of Canny in
    place of the median rule. `per_view` holds replacements by view name, such as {"LA": {"sigma": 0.3}}.
    `levels` are replacements too, from fine to coarse, such as {"blur": 2, "min_length": 30}: the edges of
    each are stored beside the others, for `EdgeDegrade` to choose from where training reads no images.
    """

    source: str = "image"
    bilateral_diameter: int = 11
    bilateral_sigma_color: float = 100
    bilateral_sigma_space: float = 100
    clahe_clip: float = 1.5
    clahe_tiles: int = 8
    dark_threshold: float = 10
    sigma: float = 0.38
    aperture: int = 3
    l2_gradient: bool = False
    min_length: int = 0
    body_mask: bool = False
    thresholds: tuple[float, float] | None = None
    blur: float = 0.0  # sigma of a Gaussian before all else
    per_view: Mapping[str, Mapping] = field(default_factory=dict)
    levels: Sequence[Mapping] = ()

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise InputError(f"data.preprocess.edges.source={self.source}: choose from {', '.join(SOURCES)}")
        if self.aperture not in (3, 5, 7):
            raise InputError(f"data.preprocess.edges.aperture={self.aperture}: Canny takes 3, 5 or 7")
        if not isinstance(self.sigma, int | float) or not 0 <= self.sigma < 1:
            raise InputError(f"data.preprocess.edges.sigma={self.sigma}: must lie in [0, 1)")
        for name, (low, high, whole) in RANGES.items():
            check_number(f"data.preprocess.edges.{name}", getattr(self, name), low, high, whole=whole)
        for threshold in self.thresholds or ():
            check_number("data.preprocess.edges.thresholds", threshold, 0, 10_000)
        if self.thresholds is not None and len(self.thresholds) != 2:
            raise InputError(
                "data.preprocess.edges.thresholds: give two, the lower and the upper one, or null"
            )
        known = {"bilateral_diameter", "sigma", "min_length", "thresholds", "blur", "dark_threshold"}
        is_list = isinstance(self.levels, Sequence) and not isinstance(self.levels, str)
        fits = is_list and all(isinstance(x, Mapping) and x and x.keys() <= known for x in self.levels)
        if not fits or (self.levels and self.source == "labels"):
            raise InputError(
                f"data.preprocess.edges.levels={self.levels}: give a list of mappings of "
                f"{', '.join(sorted(known))}; source must be image or both"
            )
        if not all(isinstance(changes, Mapping) for changes in self.per_view.values()):
            raise InputError("data.preprocess.edges.per_view: give a mapping of settings for each view")
        if any("levels" in changes for changes in self.per_view.values()):
            raise InputError("data.preprocess.edges.per_view: levels are the same for every view")

    def for_view(self, view: str | None) -> "EdgeRecipe":
        """The recipe with the replacements of this view."""
        changes = self.per_view.get(view, {})
        return replace(self, **changes) if changes else self

    def pyramid(self, image: np.ndarray) -> np.ndarray:
        """(L, H, W) uint8 {0, 1}: the edges of every level."""
        return np.stack([detect_edges(image, replace(self, levels=(), **level)) for level in self.levels])

    def __call__(self, image: np.ndarray | None, mask: np.ndarray | None = None) -> np.ndarray:
        """(H, W) uint8 {0, 1} from the image, the class map's contours, or both."""
        if self.source == "image" or mask is None:
            return detect_edges(image, self)
        if self.source == "labels":
            return label_contours(mask)
        return detect_edges(image, self) | label_contours(mask)


def detect_edges(image: np.ndarray, recipe: EdgeRecipe) -> np.ndarray:
    """(H, W) of any range -> (H, W) uint8 {0, 1}; no edges where the image is constant or wholly dark."""
    if recipe.blur > 0:
        image = cv2.GaussianBlur(np.asarray(image, np.float32), (0, 0), recipe.blur)
    low, high = float(image.min()), float(image.max())
    empty = np.zeros(image.shape, np.uint8)
    if not high > low:
        return empty
    grey = ((image.astype(np.float32) - low) * (255 / (high - low))).astype(np.uint8)  # (1)
    smooth = cv2.bilateralFilter(  # (2)
        grey, recipe.bilateral_diameter, recipe.bilateral_sigma_color, recipe.bilateral_sigma_space
    )
    tiles = (recipe.clahe_tiles, recipe.clahe_tiles)
    enhanced = cv2.createCLAHE(recipe.clahe_clip, tiles).apply(smooth)  # (3)
    inside = find_body(enhanced) if recipe.body_mask else enhanced > recipe.dark_threshold  # (4)
    if not inside.any():
        return empty
    lower, upper = recipe.thresholds or auto_thresholds(enhanced[inside], recipe.sigma)  # (5)
    # (6)
    canny = cv2.Canny(enhanced, lower, upper, apertureSize=recipe.aperture, L2gradient=recipe.l2_gradient)
    edges = (canny > 0).astype(np.uint8) * inside  # (7), (8)
    return drop_short(edges, recipe.min_length)


def auto_thresholds(values: np.ndarray, sigma: float) -> tuple[float, float]:
    """Canny thresholds (1 -+ sigma) times the median."""
    median = float(np.median(values))
    return max(0.0, (1 - sigma) * median), min(255.0, (1 + sigma) * median)


def find_body(grey: np.ndarray) -> np.ndarray:
    """Boolean mask: the largest component above Otsu's threshold, its holes filled."""
    _, bright = cv2.threshold(grey, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    count, components, stats, _ = cv2.connectedComponentsWithStats(bright, connectivity=EIGHT)
    if count < 2:
        return np.zeros(grey.shape, bool)
    largest = (components == 1 + stats[1:, cv2.CC_STAT_AREA].argmax()).astype(np.uint8)
    outlines, _ = cv2.findContours(largest, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.zeros_like(largest), outlines, -1, 1, cv2.FILLED) > 0


def drop_short(edges: np.ndarray, min_length: int) -> np.ndarray:
    """Remove 8-connected components of fewer than `min_length` pixels."""
    if min_length <= 1:
        return edges
    _, components, stats, _ = cv2.connectedComponentsWithStats(edges, connectivity=EIGHT)
    keep = stats[:, cv2.CC_STAT_AREA] >= min_length
    keep[0] = False
    return keep[components].astype(np.uint8)


def label_contours(mask: np.ndarray) -> np.ndarray:
    """(H, W) uint8: pixels whose right or lower neighbour belongs to another class."""
    edges = np.zeros(mask.shape, np.uint8)
    edges[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    edges[:-1] |= mask[:-1] != mask[1:]
    return edges


@dataclass(frozen=True)
class EdgeDegrade:
    """Make an edge map rougher, as a hand would draw it: level d in [0, 1], 0 leaves it untouched, 1 is the
    worst.

    Every effect grows with d: (a) the detector run again with blur, other thresholds and no short pieces
    (needs the image; without it one of the stored levels, if there are any), (b) components dropped or only
    the longest kept, (c) lines simplified by Douglas-Peucker and redrawn with a pen, (d) vertices moved by a
    smooth field, (e) gaps, thickening and thinning, (f) spurious strokes, (g) class contours alone (needs the
    class map), (h) nothing at all. Probabilities hold at d = 1, lengths in pixels at d = 1 and 256 x 256.
    """

    recipe: EdgeRecipe = EdgeRecipe()
    redetect_prob: float = 0.25
    drop_components: float = 0.7
    keep_longest_prob: float = 0.3
    simplify_epsilon: float = 5.0
    max_shift: float = 3.0
    max_thickness: int = 3
    num_gaps: int = 12
    morphology_prob: float = 0.2
    num_strokes: float = 3.0
    contours_only_prob: float = 0.1
    full_drop_prob: float = 0.1

    def __call__(
        self,
        edges: np.ndarray,
        level: float,
        generator: np.random.Generator,
        image: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        stored: np.ndarray | None = None,
    ) -> np.ndarray:
        """(H, W) uint8 {0, 1} -> the same; `image` (H, W) or `stored` levels (L, H, W) enable (a), `mask`
        (H, W) enables (g).
        """
        if not 0 <= level <= 1:
            raise ValueError(f"level={level}: an edge degradation level lies in [0, 1]")
        if level == 0:
            return edges
        if generator.random() < level * self.full_drop_prob:  # (h)
            return np.zeros_like(edges)
        if generator.random() < level * self.contours_only_prob and mask is not None:  # (g)
            return label_contours(mask)
        edges = np.ascontiguousarray(edges, np.uint8)
        if generator.random() < level * self.redetect_prob and self.recipe.source != "labels":
            if image is not None:
                edges = self.redetect(image, level, generator, mask)
            elif stored is not None:
                coarsest = 1 + round(level * (len(stored) - 1))
                edges = stored[generator.integers(coarsest)].copy()
        edges = self.drop(edges, level, generator)
        edges = self.redraw(edges, level, generator)
        edges = self.erase(edges, level, generator)
        return self.scribble(edges, level, generator)

    def for_view(self, view: str | None) -> "EdgeDegrade":
        """The same with the detector of this view."""
        return replace(self, recipe=self.recipe.for_view(view))

    def redetect(  # (a)
        self, image: np.ndarray, level: float, generator: np.random.Generator, mask: np.ndarray | None = None
    ) -> np.ndarray:
        blur = 3 * level * generator.random()
        sigma = self.recipe.sigma + level * generator.uniform(0.2 - 0.38, 0.6 - 0.38)
        min_length = round(60 * level * generator.random() * min(image.shape) / 256)
        changes = {"sigma": float(np.clip(sigma, 0, 0.99)), "min_length": min_length}
        blur = max(self.recipe.blur, blur if blur > 0.3 else 0.0)
        return replace(self.recipe, blur=blur, **changes)(image, mask)

    def drop(self, edges: np.ndarray, level: float, generator: np.random.Generator) -> np.ndarray:  # (b)
        count, components, stats, _ = cv2.connectedComponentsWithStats(edges, connectivity=EIGHT)
        keep = generator.random(count) >= level * self.drop_components
        if generator.random() < level * self.keep_longest_prob and count > 1:
            kept = max(1, round((count - 1) * (1 - level * self.drop_components)))
            keep = np.zeros(count, bool)
            keep[1 + np.argsort(-stats[1:, cv2.CC_STAT_AREA], kind="stable")[:kept]] = True
        keep[0] = False
        return keep[components].astype(np.uint8)

    def redraw(
        self, edges: np.ndarray, level: float, generator: np.random.Generator
    ) -> np.ndarray:  # (c), (d)
        """Draws every contour anew: simplified, displaced, and with a pen of another width."""
        scale = min(edges.shape) / 256
        epsilon = self.simplify_epsilon * level * generator.random() * scale
        shift = smooth_field(edges.shape, self.max_shift * level * generator.random() * scale, generator)
        pen = int(generator.integers(1, self.max_thickness + 1)) if generator.random() < 0.3 * level else 1
        thickness = max(1, round(pen * scale))
        out = np.zeros_like(edges)
        outlines, _ = cv2.findContours(edges, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        for outline in outlines:
            points = outline[:, 0]
            moved = points + shift[points[:, 1], points[:, 0]]
            line = cv2.approxPolyDP(np.rint(moved).astype(np.int32), epsilon, closed=True)
            cv2.polylines(out, [line], True, 1, thickness)
        return out

    def erase(self, edges: np.ndarray, level: float, generator: np.random.Generator) -> np.ndarray:  # (e)
        height, width = edges.shape
        for _ in range(round(self.num_gaps * level * generator.random())):
            center = (int(generator.integers(width)), int(generator.integers(height)))
            radius = round(min(height, width) * generator.uniform(0.01, 0.06))
            cv2.circle(edges, center, radius, 0, cv2.FILLED)
        if generator.random() < level * self.morphology_prob:
            operation = cv2.dilate if generator.random() < 0.5 else cv2.erode
            edges = operation(edges, np.ones((1, 2), np.uint8))
        return edges

    def scribble(self, edges: np.ndarray, level: float, generator: np.random.Generator) -> np.ndarray:  # (f)
        size = np.array(edges.shape[::-1])
        for _ in range(generator.poisson(self.num_strokes * level)):
            steps = generator.normal(0, 0.02, (int(generator.integers(3, 8)), 2)) * size
            line = generator.random(2) * size + np.cumsum(np.cumsum(steps, 0) * 0.5, 0)
            cv2.polylines(edges, [np.rint(line).astype(np.int32)], False, 1)
        return edges


def smooth_field(shape: Sequence[int], amplitude: float, generator: np.random.Generator) -> np.ndarray:
    """(H, W, 2) displacements in pixels, drawn on an 8 x 8 grid, at most `amplitude` long an axis."""
    coarse = generator.uniform(-1, 1, (8, 8, 2)).astype(np.float32) * amplitude
    return cv2.resize(coarse, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)
