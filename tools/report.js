"use strict";
// A comparison of versions of one image: two of them on a stage with a boundary that moves, and
// below it the same detail of all.  Without this script the page shows every version whole.

function setUpComparison(section) {
  const find = (selector) => section.querySelector(selector);
  const images = [...section.querySelectorAll("figure img")];
  const names = images.map((image) => image.alt);
  const stage = find(".stage");
  const boundary = find("[data-boundary]");
  const sides = { left: find("[data-side=left]"), right: find("[data-side=right]") };
  const across = find("[data-across]");
  const down = find("[data-down]");
  const extent = find("[data-extent]");
  const width = images[0].naturalWidth;
  const height = images[0].naturalHeight;

  // The image on the right lies below, the one on the left above it, cut off at the boundary.
  const shown = {};
  for (const side of ["right", "left"]) {
    shown[side] = document.createElement("img");
    shown[side].draggable = false;
    stage.append(shown[side]);
  }
  const line = document.createElement("span");
  line.className = "line";
  const frame = document.createElement("span");
  frame.className = "frame";
  stage.append(line, frame);
  stage.style.aspectRatio = `${width} / ${height}`;
  // Not enlarged, and the slider as wide as the stage, so that its thumb is below the boundary.
  find(".view").style.maxWidth = `${Math.max(width, 320)}px`;

  // Each version gives way to a canvas, which shows a part of it pixel by pixel.
  const canvases = images.map((image) => {
    const canvas = document.createElement("canvas");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Detail of: ${image.alt}`);
    image.hidden = true;
    image.after(canvas);
    return canvas;
  });

  function showSides() {
    for (const [side, select] of Object.entries(sides)) {
      shown[side].src = images[select.value].src;
      shown[side].alt = `${side}: ${names[select.value]}`;
    }
    showBoundary();
  }

  function showBoundary() {
    const percent = Number(boundary.value);
    shown.left.style.clipPath = `inset(0 ${100 - percent}% 0 0)`;
    line.style.left = `${percent}%`;
    const [left, right] = [names[sides.left.value], names[sides.right.value]];
    boundary.setAttribute("aria-valuetext", `${percent} % ${left}, ${100 - percent} % ${right}`);
  }

  function showDetail() {
    const side = Math.min(Number(extent.value), width, height);
    // A range moves its value inside when its maximum falls below it.
    across.max = width - side;
    down.max = height - side;
    const [left, top] = [Number(across.value), Number(down.value)];
    canvases.forEach((canvas, k) => {
      canvas.width = canvas.height = side;
      canvas.getContext("2d").drawImage(images[k], left, top, side, side, 0, 0, side, side);
    });
    frame.style.left = `${(100 * left) / width}%`;
    frame.style.top = `${(100 * top) / height}%`;
    frame.style.width = `${(100 * side) / width}%`;
    frame.style.height = `${(100 * side) / height}%`;
  }

  // On the stage, dragging moves the boundary, and a tap moves the detail there.
  let pressedAt = null;
  function place(event) {
    const box = stage.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  }
  stage.addEventListener("pointerdown", (event) => {
    pressedAt = { x: event.clientX, y: event.clientY, dragged: false };
    stage.setPointerCapture(event.pointerId);
  });
  stage.addEventListener("pointermove", (event) => {
    if (!pressedAt) return;
    pressedAt.dragged ||= Math.abs(event.clientX - pressedAt.x) > 4;
    if (!pressedAt.dragged) return;
    boundary.value = Math.round(100 * place(event)[0]);
    showBoundary();
  });
  stage.addEventListener("pointerup", (event) => {
    const moved = pressedAt && Math.abs(event.clientY - pressedAt.y) > 4;
    if (pressedAt && !pressedAt.dragged && !moved) {
      const side = Math.min(Number(extent.value), width, height);
      const [x, y] = place(event);
      across.value = Math.round(x * width - side / 2);
      down.value = Math.round(y * height - side / 2);
      showDetail();
    }
    pressedAt = null;
  });
  // The browser took the finger for scrolling.
  stage.addEventListener("pointercancel", () => (pressedAt = null));

  boundary.addEventListener("input", showBoundary);
  for (const select of Object.values(sides)) select.addEventListener("change", showSides);
  for (const input of [across, down]) input.addEventListener("input", showDetail);
  extent.addEventListener("change", showDetail);
  showSides();
  showDetail();
  for (const part of section.querySelectorAll("[data-needs-script]")) part.hidden = false;
}

// Once everything is loaded, sizes are known and pixels can be drawn.
addEventListener("load", () => document.querySelectorAll(".comparison").forEach(setUpComparison));
