// Boxes onto the canvas.

import { boxAt } from "./boxes.js";
import { colourOf } from "./colours.js";
import { counted, line } from "./words.js";

/** Pixels from one row to the next. */
export const ROW_HEIGHT = 24;
const BOX_HEIGHT = ROW_HEIGHT - 1;
const MARGIN = 5;
const MIN_LABEL_WIDTH = 40;
const FONT = "12px system-ui, sans-serif";
const DIMMED = 0.25;

/** Draw boxes. `scene` says what of: segments, tree, colouring, classes, matches, selected, hovered, title. */
export function draw(canvas, boxes, scene, palette) {
  const context = prepared(canvas, palette);
  for (const box of boxes) fillBox(context, box, scene, palette);
  outline(context, boxes, scene.hovered, palette, 1);
  outline(context, boxes, scene.selected, palette, 3);
}

function prepared(canvas, palette) {
  const { clientWidth: width, clientHeight: height } = canvas;
  const ratio = window.devicePixelRatio || 1;
  const size = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
  const context = canvas.getContext("2d", { alpha: false });
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.fillStyle = palette["--paper"];
  context.fillRect(0, 0, width, height);
  context.font = FONT;
  context.textBaseline = "middle";
  return context;
}

function fillBox(context, box, scene, palette) {
  const isFound = scene.matches?.has[box.node] && !box.places;
  context.globalAlpha = scene.matches && !isFound ? DIMMED : 1;
  context.fillStyle = palette[isFound ? "--found" : fillOf(box, scene)];
  context.fillRect(box.x, box.row * ROW_HEIGHT, Math.max(box.width - gap(box), 0.5), BOX_HEIGHT);
  context.globalAlpha = 1;
  if (box.places && scene.matches?.among(box.places)) markMatches(context, box, scene, palette);
  if (box.width >= MIN_LABEL_WIDTH) write(context, box, labelOf(box, scene), palette[isFound ? "--found-ink" : "--ink"]);
}

const gap = (box) => (box.width > 3 ? 1 : 0);

function fillOf({ node, places }, { tree, colouring, classes }) {
  if (places) return "--merged";
  return node === tree.root ? "--trunk" : colourOf(colouring, classes[node]);
}

/** In a box of many segments, a line at every pixel that has a match. */
function markMatches(context, { node, x, width, row, places: [begin, end] }, { tree, matches, view }, palette) {
  const scale = view.span / context.canvas.clientWidth;
  context.fillStyle = palette["--found"];
  for (let pixel = 0; pixel < width; pixel++) {
    const left = view.left + (x + pixel) * scale;
    const some = [left, left + scale].map((edge) => Math.min(Math.max(begin, tree.firstBehind(node, edge)), end - 1));
    if (matches.among([some[0], some[1] + 1])) context.fillRect(x + pixel, row * ROW_HEIGHT, 1, BOX_HEIGHT);
  }
}

function labelOf({ node, places, width }, { segments, tree, title }) {
  if (places) return counted(places[1] - places[0], "segment");
  return node === tree.root ? title : line(segments.texts[node], Math.ceil(width / 3));
}

function write(context, box, label, ink) {
  const [begin, end] = [Math.max(box.x, 0) + MARGIN, Math.min(box.x + box.width, context.canvas.clientWidth) - MARGIN];
  context.fillStyle = ink;
  context.fillText(fitting(context, label, end - begin), begin, box.row * ROW_HEIGHT + BOX_HEIGHT / 2 + 0.5);
}

/** The beginning of a label that is no wider than so many pixels. */
function fitting(context, label, width) {
  let shown = label;
  for (let actual = context.measureText(shown).width; actual > width && shown; actual = context.measureText(shown).width) {
    const characters = [...shown.replace(/…$/, "")];
    const count = Math.min(characters.length - 1, Math.floor((characters.length * width) / actual));
    shown = count > 0 ? `${characters.slice(0, count).join("")}…` : "";
  }
  return shown;
}

function outline(context, boxes, node, palette, thickness) {
  const box = boxes.find((each) => each.node === node && !each.places);
  if (!box) return;
  context.strokeStyle = palette["--accent"];
  context.lineWidth = thickness;
  const [margin, row] = [thickness / 2, box.row * ROW_HEIGHT];
  context.strokeRect(box.x + margin, row + margin, Math.max(box.width - gap(box) - thickness, 1), BOX_HEIGHT - thickness);
}

/** The box under the pointer. */
export function boxUnder(boxes, event) {
  return boxAt(boxes, event.offsetX, event.offsetY / ROW_HEIGHT);
}
