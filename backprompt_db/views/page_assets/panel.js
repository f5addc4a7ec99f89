// The panel beside the tree: everything about the selected segment.

import { button, element } from "./elements.js";
import { highlight } from "./search.js";
import { MEASURES } from "./segments.js";
import { idsOf, remarkOn, textOf } from "./tokens.js";
import { counted, line, number } from "./words.js";

const NUM_LINKS = 50;
const LINK_LENGTH = 80;

/** Fill the panel with a segment. `go` is called with the number of another one that is asked for. */
export function fill(panel, node, { segments, tree, measure, query, go, close }) {
  const tokens = segments.contents.tokens[node];
  const text = textOf(segments.texts[node], tokens);
  panel.replaceChildren(
    element("h2", {}, `Segment ${number(node + 1)}`, button("×", close, { "aria-label": "Close", id: "close" })),
    text,
    ...(tokens && !tokens.pieces ? [idsOf(tokens)] : []),
    ...notes(node, segments, tokens),
    element("h3", {}, "Facts"),
    facts([...segments.facts(node), ["with all below", `${counted(tree.below[node], "segment")}, ${MEASURES[measure].words(tree.total[node])}`]]),
    ...links("Parents", segments.parentsOf(node), absent(segments, node), segments, go),
    ...links("Children", segments.childrenOf(node), [], segments, go),
  );
  bringIntoView(panel, highlight(text, query));
}

/** Scroll to what was found, if it lies below what can be seen, else to the beginning. */
function bringIntoView(panel, range) {
  panel.scrollTop = 0;
  const below = range ? range.getBoundingClientRect().bottom - panel.getBoundingClientRect().bottom : 0;
  if (below > 0) panel.scrollTop = below + panel.clientHeight / 2;
}

function notes(node, segments, tokens) {
  const found = [];
  const length = segments.shortened[node];
  if (length) found.push(`The first ${number([...segments.texts[node]].length)} of ${number(length)} characters.`);
  found.push(tokens ? remarkOn(tokens) : "No log-probabilities of its tokens are on this page.");
  return found.map((words) => element("p", { class: "note" }, words));
}

function facts(pairs) {
  const list = element("dl", { id: "facts" });
  for (const [name, words] of pairs) list.append(element("dt", {}, name), element("dd", { dir: "auto" }, words));
  return list;
}

function absent(segments, node) {
  const found = [];
  const count = segments.absent_parents[node] ?? 0;
  if (segments.parentsOf(node).length > 1) found.push("It follows all of these, and is drawn below the first.");
  if (count) found.push(`It was computed after ${counted(count, count > 1 || segments.parentsOf(node).length ? "other segment" : "segment")} not on this page: evicted, or not selected.`);
  return found;
}

function links(title, nodes, remarks, segments, go) {
  if (!nodes.length && !remarks.length) return [];
  const items = nodes.slice(0, NUM_LINKS).map((node) => element("li", {}, link(node, segments, go)));
  if (nodes.length > NUM_LINKS) remarks = [...remarks, `… and ${counted(nodes.length - NUM_LINKS, "other")}.`];
  return [
    element("h3", {}, nodes.length > 1 ? `${title} (${number(nodes.length)})` : title),
    element("ul", { id: title.toLowerCase() }, ...items),
    ...remarks.map((words) => element("p", { class: "note" }, words)),
  ];
}

function link(node, segments, go) {
  return button(line(segments.texts[node], LINK_LENGTH), () => go(node), { "data-node": node });
}
