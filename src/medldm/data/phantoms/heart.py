"""Draws an oblique slice through a chest: fat, muscle, ribs, lungs, liver, spine and aorta, and a beating
heart.

Textures follow the anatomy, so that edges and class map determine much of the image.
"""

import numpy as np

from medldm.data.phantoms.canvas import CARDIAC_SIGNAL, Canvas, draw_lobes


class Anatomy:
    """All lengths (mm), angles and signals of one subject, drawn from a generator."""

    def __init__(self, generator: np.random.Generator, disease: str) -> None:
        g = generator
        self.size = g.uniform(0.9, 1.1)
        self.chest = (g.uniform(150, 172) * self.size, g.uniform(108, 124) * self.size)
        self.fat = g.uniform(7, 18)
        self.chest_lobes = draw_lobes(g, 0.02)
        self.heart = np.array([g.uniform(18, 38), g.uniform(-18, 2)])
        self.lv_radius = g.uniform(23, 27) * self.size * (1.25 if disease == "LV" else 1.0)
        self.wall = g.uniform(8, 10) * (1.6 if disease == "HCM" else 1.0)
        self.rv_scale = g.uniform(0.9, 1.1) * (1.25 if disease in ("RV", "TRI", "FALL", "CIA") else 1.0)
        self.ejection = g.uniform(0.26, 0.36) * (0.45 if disease == "LV" else 1.0)
        self.length = g.uniform(80, 96) * self.size
        self.septum_angle = g.uniform(2.75, 3.25)  # direction from LV to RV, to the left of the picture
        self.lv_lobes, self.rv_lobes = draw_lobes(g, 0.02), draw_lobes(g, 0.03)
        self.papillary = [
            (g.uniform(0.3, 0.7), g.uniform(2.4, 3.6)),
            (g.uniform(2.2, 2.7), g.uniform(2.4, 3.6)),
        ]
        self.signal = {name: value * g.uniform(0.94, 1.06) for name, value in CARDIAC_SIGNAL.items()}
        self.liver_top = g.uniform(14, 28)
        self.vessels = g.uniform(-1, 1, (26, 3))
        self.trabeculae = g.uniform(-1, 1, (14, 3))
        self.bias = g.uniform(-0.10, 0.10, 2)
        self.pose = (g.uniform(-0.25, 0.25), g.uniform(-22, 12), g.uniform(-16, 20))
        self.apex_angle = g.uniform(0.65, 0.95)  # long-axis tilt in the four-chamber view


def draw_chest(canvas: Canvas, anatomy: Anatomy, level: float) -> None:
    """Paints the background of a slice at `level`, from -1 (towards the head) to 1 (towards the feet)."""
    a, signal = anatomy, anatomy.signal
    width, depth = a.chest[0] * (1 - 0.03 * level), a.chest[1] * (1 - 0.02 * level)
    body = canvas.ellipse((0, 0), (width, depth), 0, a.chest_lobes)
    canvas.paint(body, signal["fat"])
    canvas.paint(body + a.fat, signal["muscle"])
    for i in range(14):  # ribs, cut obliquely
        angle = 2 * np.pi * (i + 0.5) / 14 + 0.12 * level
        center = (0.86 * (width - a.fat) * np.cos(angle), 0.86 * (depth - a.fat) * np.sin(angle))
        rib = canvas.ellipse(center, (9, 4.5), angle + np.pi / 2)
        canvas.paint(rib, signal["bone"])
        canvas.paint(rib + 1.8, signal["marrow"])
    inner = canvas.ellipse((0, 0), (width - a.fat - 20, depth - a.fat - 17), 0, a.chest_lobes)
    canvas.paint(inner, signal["fat"] * 0.55)  # mediastinum
    for side in (-1, 1):
        lung = canvas.ellipse(
            (side * 0.47 * width, -4), (0.36 * width, 0.66 * depth), side * 0.12, a.chest_lobes
        )
        lung = np.maximum(lung, inner + 2)
        canvas.paint(lung, signal["lung"])
        for u, v, size in (
            a.vessels[:13] if side < 0 else a.vessels[13:]
        ):  # lung vessels, moving with the level
            center = (side * (0.45 + 0.2 * u) * width, (0.45 * v + 0.08 * level * size) * depth)
            canvas.paint(
                np.maximum(canvas.ellipse(center, (2.2 + size, 2.2 + size)), lung + 2), signal["vessel"] * 0.6
            )
    draw_abdomen(canvas, a, level, width, depth, inner)
    spine = (0.0, 0.68 * depth)
    canvas.paint(canvas.ellipse(spine, (19, 15)), signal["bone"])
    canvas.paint(canvas.ellipse(spine, (17, 13)), signal["marrow"])
    canvas.paint(canvas.ellipse((0, spine[1] + 21), (8, 6)), signal["cord"])
    for side in (-1, 1):
        canvas.paint(canvas.ellipse((side * 34, 0.74 * depth), (22, 12), side * -0.3), signal["muscle"] * 1.1)
    aorta = canvas.ellipse((19, 0.44 * depth), (11, 11))
    canvas.paint(aorta - 1.5, signal["muscle"])
    canvas.paint(aorta, signal["blood"])


def draw_abdomen(
    canvas: Canvas, a: Anatomy, level: float, width: float, depth: float, inner: np.ndarray
) -> None:
    """Paints the dome of the liver, the spleen and the gas of the stomach in slices towards the feet."""
    rise = level + 0.35
    if rise <= 0:
        return
    reach = min(1.0, 0.45 + 0.5 * rise)
    liver = canvas.ellipse(
        (-0.42 * width, a.liver_top), (0.44 * width * reach, 0.62 * depth * reach), -0.15, a.chest_lobes
    )
    liver = np.maximum(liver, inner + 1.5)
    canvas.paint(liver, a.signal["liver"])
    for u, v, size in a.vessels[:9]:
        center = (-0.42 * width + 0.28 * u * width * reach, a.liver_top + 0.4 * v * depth * reach)
        vein = canvas.ellipse(center, (3.6 + 2 * size, 2.4 + size), 3 * v)
        canvas.paint(np.maximum(vein, liver + 3), a.signal["vessel"])
    spleen = np.maximum(
        canvas.ellipse((0.56 * width, 0.24 * depth), (26 * reach, 36 * reach), 0.3), inner + 1.5
    )
    canvas.paint(spleen, a.signal["spleen"])


def heart_state(a: Anatomy, contraction: float) -> tuple[float, float]:
    """(radius of the cavity, thickness of the wall) in mm at `contraction` 0 (ED) to 1 (ES). The area of the
    wall in the slice stays the same.
    """
    cavity = a.lv_radius * (1 - a.ejection * contraction)
    area = (a.lv_radius + a.wall) ** 2 - a.lv_radius**2
    return cavity, np.sqrt(cavity**2 + area) - cavity


def draw_short_axis(canvas: Canvas, a: Anatomy, place: float, contraction: float) -> np.ndarray:
    """Paints the heart at `place` from 0 (base) to 1 (apex), and returns the class map."""
    signal, labels = a.signal, np.zeros(canvas.shape, np.uint8)
    if place > 1.02:
        return labels
    taper = np.sqrt(max(0.02, 1 - (0.95 * place) ** 2.4))
    cavity, wall = heart_state(a, contraction)
    cavity, wall = cavity * taper, wall * (0.75 + 0.25 * taper)
    center = a.heart + np.array([6.0, 4.0]) * place
    direction = np.array([np.cos(a.septum_angle), np.sin(a.septum_angle)])
    outer = cavity + wall
    epicardium = canvas.ellipse(tuple(center), (outer, outer * 0.96), 0.3, a.lv_lobes)
    endocardium = canvas.ellipse(tuple(center), (cavity, cavity * 0.96), 0.3, a.lv_lobes)
    rv_reach = a.rv_scale * (1 - 0.22 * contraction) * max(0.0, 1 - 1.05 * place**1.6)
    rv_center = center + direction * (0.75 * outer)
    rv_radii = (max(1.0, outer * (0.4 + 0.72 * rv_reach)), max(1.0, outer * (0.4 + 0.6 * rv_reach)))
    ventricle = canvas.ellipse(tuple(rv_center), rv_radii, a.septum_angle, a.rv_lobes)
    pericardium = np.minimum(ventricle - 4.5, epicardium - 2.5)
    canvas.paint(pericardium - 3.5, signal["fat"])
    canvas.paint(pericardium, signal["muscle"] * 0.9)
    has_rv = rv_reach > 0.12
    if has_rv:
        canvas.paint(ventricle, signal["blood"] * 0.96)
        for u, v, size in a.trabeculae:
            spot = (
                rv_center
                + direction * (0.75 * u * rv_radii[0])
                + np.array([-direction[1], direction[0]]) * (v * rv_radii[1])
            )
            canvas.paint(
                np.maximum(canvas.ellipse(tuple(spot), (2.2 + size, 1.6 + 0.5 * size), v), ventricle + 1),
                0.55,
            )
    canvas.paint(epicardium, signal["myocardium"])
    canvas.paint(endocardium, signal["blood"])
    for angle, size in a.papillary:
        if 0.15 < place < 0.8:
            spot = center + 0.72 * cavity * np.array([np.cos(angle), np.sin(angle)])
            muscle = canvas.ellipse(tuple(spot), (size * taper * (1 + 0.4 * contraction),) * 2)
            canvas.paint(np.maximum(muscle, endocardium + 0.5), signal["myocardium"] * 1.1)
    if has_rv:
        labels[ventricle < 0] = 3
    labels[epicardium < 0] = 2
    labels[endocardium < 0] = 1
    return labels


def draw_long_axis(canvas: Canvas, a: Anatomy, contraction: float) -> np.ndarray:
    """Paints the four-chamber view, and returns the class map. The atria are blood without a class."""
    signal, labels = a.signal, np.zeros(canvas.shape, np.uint8)
    cavity, wall = heart_state(a, contraction)
    length = a.length * (1 - 0.14 * contraction)
    # from base to apex: to the right and upwards
    axis = np.array([np.cos(a.apex_angle), -np.sin(a.apex_angle)])
    across = np.array([-axis[1], axis[0]])  # towards the lateral wall
    base = a.heart + np.array([-16.0, 22.0]) + 10 * contraction * axis * 0.5
    # mm from the valve plane to the apex
    along = (canvas.x - base[0]) * axis[0] + (canvas.y - base[1]) * axis[1]
    aside = (canvas.x - base[0]) * across[0] + (canvas.y - base[1]) * across[1]

    def chamber(half_width: float, reach: float, shift: float) -> np.ndarray:
        """The distance to half an ellipsoid, from the valve plane to `reach`."""
        r = np.sqrt((along / reach) ** 2 + ((aside - shift) / half_width) ** 2)
        return np.maximum((r - 1) * min(half_width, reach), -along)

    endocardium, epicardium = chamber(cavity, length - wall, 0.0), chamber(cavity + wall, length, 0.0)
    rv_width = 21 * a.rv_scale * a.size * (1 - 0.25 * contraction)
    ventricle = chamber(rv_width + 12, 0.84 * length, -(cavity + wall + 0.25 * rv_width))
    pericardium = np.minimum(ventricle - 4.0, epicardium - 2.0)
    grow = 1 + 0.25 * contraction
    left = canvas.ellipse(tuple(base - axis * 21 * grow + across * 2), (24 * grow, 20 * grow), -a.apex_angle)
    right = canvas.ellipse(
        tuple(base - axis * 17 * grow - across * 52), (23 * grow, 20 * grow), -a.apex_angle
    )
    atria = np.minimum(left, right)
    canvas.paint(np.minimum(pericardium, atria) - 3.5, signal["fat"])
    canvas.paint(np.minimum(pericardium, atria - 2), signal["muscle"] * 0.9)
    canvas.paint(atria, signal["blood"] * 0.97)
    canvas.paint(ventricle, signal["blood"] * 0.96)
    for u, v, size in a.trabeculae:
        spot = base + axis * length * (0.4 + 0.3 * u) - across * (cavity + wall + rv_width * (0.7 + 0.3 * v))
        canvas.paint(np.maximum(canvas.ellipse(tuple(spot), (2.4 + size, 1.6), v), ventricle + 1), 0.55)
    canvas.paint(epicardium, signal["myocardium"])
    canvas.paint(endocardium, signal["blood"])
    labels[ventricle < 0] = 3
    labels[epicardium < 0] = 2
    labels[endocardium < 0] = 1
    return labels


def contraction_of(frame: int, num_frames: int) -> float:
    """The contraction: 0 at frame 0 (end-diastole), 1 at the middle frame (end-systole)."""
    return float(np.sin(np.pi * frame / num_frames) ** 2)
