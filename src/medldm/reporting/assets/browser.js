"use strict";
// Slices through stacks of images. Each `.browser` holds its arrays as JSON: every layer is one picture with all slices of an
// array as tiles, from which the three planes are cut here. Axes of an array: towards the feet, the back and the left.
(() => {
  const COLOURS = [[0, 0, 0], [31, 119, 180], [255, 127, 14], [44, 160, 44], [214, 39, 40], [148, 103, 189],
    [140, 86, 75], [227, 119, 194], [127, 127, 127], [188, 189, 34], [23, 190, 207]];
  const grey = (value) => [value, value, value];
  const label = (value) => COLOURS[value === 0 ? 0 : (value - 1) % 10 + 1];
  const signed = (difference) => ((value) => value > 0 ? [255, 255 - value, 255 - value] : [255 + value, 255 + value, 255])(
    Math.max(-255, Math.min(255, 2 * difference)));

  // A layer's picture of tiles -> Uint8Array of depth * height * width.
  const unpack = async (layer, [depth, height, width]) => {
    const image = new Image();
    image.src = layer.png;
    await image.decode();
    const canvas = document.createElement("canvas");
    canvas.width = image.width;
    canvas.height = image.height;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, image.width, image.height).data;
    const columns = image.width / width, values = new Uint8Array(depth * height * width);
    for (let d = 0, place = 0; d < depth; d++) {
      const top = Math.floor(d / columns) * height, left = (d % columns) * width;
      for (let h = 0; h < height; h++) {
        let from = 4 * ((top + h) * image.width + left);
        for (let w = 0; w < width; w++, from += 4) values[place++] = pixels[from];
      }
    }
    return values;
  };

  const start = async (root) => {
    const data = JSON.parse(root.querySelector("script").textContent);
    const find = (selector) => root.querySelector(selector);
    const choice = find("select"), groups = [...root.querySelectorAll("[data-plane]")];
    const place = [0, 0, 0];
    let stack = null, arrays = {};

    // A tone of layer `name` at a voxel: [r, g, b].
    const toneOf = (layer) => {
      if (layer.kind === "difference") {
        const [a, b] = layer.of.map((name) => arrays[name]);
        return (i) => signed(a[i] - b[i]);
      }
      const values = arrays[layer.name], tone = layer.kind === "map" ? label : grey;
      return (i) => tone(values[i]);
    };

    const draw = (group) => {
      const plane = Number(group.dataset.plane), [rows, columns] = [0, 1, 2].filter((axis) => axis !== plane);
      const strides = [stack.shape[1] * stack.shape[2], stack.shape[2], 1];
      const height = stack.shape[rows], width = stack.shape[columns];
      for (const pane of group.querySelectorAll(".pane")) {
        const layer = stack.layers.find((each) => each.name === pane.dataset.layer);
        pane.hidden = !layer;
        if (!layer) continue;
        const canvas = pane.querySelector("canvas"), frame = pane.querySelector(".frame");
        canvas.width = width;
        canvas.height = height;
        const context = canvas.getContext("2d"), picture = context.createImageData(width, height);
        const tone = toneOf(layer), origin = place[plane] * strides[plane];
        for (let h = 0, to = 0; h < height; h++) {
          for (let w = 0; w < width; w++, to += 4) {
            const [r, g, b] = tone(origin + h * strides[rows] + w * strides[columns]);
            picture.data[to] = r;
            picture.data[to + 1] = g;
            picture.data[to + 2] = b;
            picture.data[to + 3] = 255;
          }
        }
        context.putImageData(picture, 0, 0);
        const scale = 218 / Math.max(...stack.extent);
        frame.style.width = `${stack.extent[columns] * scale}px`;
        frame.style.height = `${stack.extent[rows] * scale}px`;
        frame.querySelector(".across").style.top = `${100 * (place[rows] + 0.5) / height}%`;
        frame.querySelector(".down").style.left = `${100 * (place[columns] + 0.5) / width}%`;
        canvas.setAttribute("aria-label", `${layer.name}, ${said(plane)}`);
      }
    };

    const said = (plane) => stack.labels ? stack.labels[place[plane]]
      : `${stack.planes[plane]} slice ${place[plane] + 1} of ${stack.shape[plane]}`;

    const show = () => {
      for (const group of groups) {
        const plane = Number(group.dataset.plane), slider = group.querySelector("input");
        group.hidden = plane >= stack.planes.length;
        if (group.hidden) continue;
        slider.max = stack.shape[plane] - 1;
        slider.value = place[plane];
        slider.setAttribute("aria-valuetext", said(plane));
        group.querySelector("output").textContent = said(plane);
        group.querySelector("label span").textContent = stack.planes[plane];
        draw(group);
      }
      find("[name=lines]").parentElement.hidden = stack.planes.length < 2;
      root.classList.toggle("hide-lines", stack.planes.length < 2 || !find("[name=lines]").checked);
    };

    const move = (plane, to) => {
      place[plane] = Math.min(Math.max(to, 0), stack.shape[plane] - 1);
      show();
    };

    const choose = async () => {
      stack = data[choice.selectedIndex];
      arrays = {};
      for (const layer of stack.layers) if (layer.png) arrays[layer.name] = await unpack(layer, stack.shape);
      stack.shape.forEach((size, axis) => { place[axis] = Math.floor(size / 2); });
      if (stack.labels) place[0] = 0;
      find(".about").textContent = stack.about;
      show();
      root.dataset.ready = stack.name;
    };

    const steps = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10 };
    for (const group of groups) {
      const plane = Number(group.dataset.plane);
      group.querySelector("input").addEventListener("input", (event) => move(plane, Number(event.target.value)));
      group.querySelector(".panes").addEventListener("keydown", (event) => {
        const to = event.key === "Home" ? 0 : event.key === "End" ? Infinity : place[plane] + steps[event.key];
        if (Number.isNaN(to)) return;
        event.preventDefault();
        move(plane, to);
      });
      for (const frame of group.querySelectorAll(".frame")) {
        frame.addEventListener("click", (event) => {
          if (stack.planes.length < 2) return;
          const box = frame.getBoundingClientRect(), axes = [0, 1, 2].filter((axis) => axis !== plane);
          const parts = [(event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width];
          axes.forEach((axis, i) => { place[axis] = Math.floor(parts[i] * (stack.shape[axis] - 1) + 0.5); });
          show();
        });
      }
    }
    find("[name=lines]").addEventListener("change", show);
    choice.addEventListener("change", choose);
    await choose();
  };

  for (const root of document.querySelectorAll(".browser")) start(root);
})();
