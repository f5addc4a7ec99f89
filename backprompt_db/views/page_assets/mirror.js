// What the canvas shows, as elements inside of it: for those who cannot see it, and for tests.

import { element } from "./elements.js";
import { MEASURES } from "./segments.js";
import { line } from "./words.js";

const MAX_ITEMS = 300;
const TEXT_LENGTH = 120;

/** Put the widest boxes into the canvas as items of a tree. Each says where its box is, in pixels. */
export function mirror(canvas, boxes, { segments, tree, measure, selected }) {
  const nodes = boxes.filter(({ node, places }) => !places && node !== tree.root);
  nodes.sort((one, other) => other.width - one.width);
  const items = nodes.slice(0, MAX_ITEMS).map((box) => item(box, segments, tree, measure, box.node === selected));
  canvas.replaceChildren(...items);
  const isShown = items.some((each) => each.id === `node${selected}`);
  if (isShown) canvas.setAttribute("aria-activedescendant", `node${selected}`);
  else canvas.removeAttribute("aria-activedescendant");
}

function item({ node, x, width, row }, segments, tree, measure, isSelected) {
  const words = `${line(segments.texts[node], TEXT_LENGTH)}, ${MEASURES[measure].words(tree.total[node])}`;
  const places = { "data-node": node, "data-x": x.toFixed(2), "data-width": width.toFixed(2), "data-row": row.toFixed(2) };
  const states = { "aria-level": tree.depth[node], "aria-selected": isSelected };
  return element("div", { role: "treeitem", id: `node${node}`, ...places, ...states }, words);
}
