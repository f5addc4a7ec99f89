// What happens when somebody does something: pointer, wheel, keys, controls.

import { ROW_HEIGHT, boxUnder } from "./drawing.js";
import { byId, element } from "./elements.js";
import { MEASURES } from "./segments.js";
import { counted, line } from "./words.js";

const WHEEL_STEP = 0.002;
const KEY_STEP = 1.5;
const CLICK_PIXELS = 4;
const TIP_LENGTH = 300;
const TYPING_MILLISECONDS = 120;

/** Let a page be used. */
export function listen(page) {
  listenToPointer(page);
  listenToKeys(page);
  listenToSearch(page);
}

function listenToPointer(page) {
  const { canvas } = page;
  let drag;
  canvas.addEventListener("pointerdown", (event) => {
    drag = { x: event.offsetX, y: event.offsetY, view: page.view };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (drag) move(page, drag, event);
    else hover(page, event);
  });
  canvas.addEventListener("pointerup", (event) => {
    const isClick = drag && !isMoved(drag, event);
    drag = undefined;
    if (isClick) click(page, event);
  });
  canvas.addEventListener("pointercancel", () => (drag = undefined));
  canvas.addEventListener("pointerleave", () => unhover(page));
  canvas.addEventListener("wheel", (event) => wheel(page, event), { passive: false });
}

function isMoved(drag, { offsetX, offsetY }) {
  return Math.hypot(offsetX - drag.x, offsetY - drag.y) >= CLICK_PIXELS;
}

function move(page, drag, event) {
  if (!isMoved(drag, event)) return;
  const shares = (drag.x - event.offsetX) / page.canvas.clientWidth;
  page.goTo(drag.view.moved(shares, (drag.y - event.offsetY) / ROW_HEIGHT), { atOnce: true });
}

/** A first click selects, a second one zooms in; where segments are too narrow, a click makes them wider. */
function click(page, event) {
  const box = boxUnder(page.boxes, event);
  unhover(page);
  if (!box) page.deselect();
  else if (box.places) page.goTo(page.view.zoomed(8, event.offsetX / page.canvas.clientWidth));
  else if (box.node === page.tree.root || box.node === page.selected) page.zoomInto(box.node);
  else page.select(box.node);
}

function wheel(page, event) {
  event.preventDefault();
  const width = page.canvas.clientWidth;
  const pixels = event.deltaMode ? ROW_HEIGHT : 1;
  if (event.shiftKey) page.goTo(page.view.moved(0, ((event.deltaY || event.deltaX) * pixels) / ROW_HEIGHT), { atOnce: true });
  else if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) page.goTo(page.view.moved((event.deltaX * pixels) / width, 0), { atOnce: true });
  else page.goTo(page.view.zoomed(Math.exp(-event.deltaY * pixels * WHEEL_STEP), event.offsetX / width), { atOnce: true });
}

function hover(page, event) {
  const box = boxUnder(page.boxes, event);
  page.hovered = box?.places ? undefined : box?.node;
  const tip = byId("tip");
  tip.hidden = !box;
  if (box) {
    tip.replaceChildren(...wordsOn(box, page).map((words) => element("p", { dir: "auto" }, words)));
    const [right, bottom] = [page.canvas.clientWidth - tip.offsetWidth, page.canvas.clientHeight - tip.offsetHeight];
    tip.style.left = `${Math.max(0, Math.min(event.offsetX + 14, right))}px`;
    tip.style.top = `${event.offsetY + 18 > bottom ? Math.max(0, event.offsetY - tip.offsetHeight - 8) : event.offsetY + 18}px`;
  }
  page.redraw();
}

function unhover(page) {
  page.hovered = undefined;
  byId("tip").hidden = true;
  page.redraw();
}

function wordsOn({ node, places }, { segments, tree, measure, matches, title }) {
  if (places) {
    const found = matches ? `, ${counted(matches.among(places), "match", "matches")} in and below them` : "";
    return [`${counted(places[1] - places[0], "segment")}, each narrower than a pixel${found}`];
  }
  const text = node === tree.root ? title : line(segments.texts[node], TIP_LENGTH);
  const below = tree.below[node] - 1;
  return [text, `${MEASURES[measure].words(tree.total[node])}${below && node !== tree.root ? `, ${counted(below, "segment")} below` : ""}`];
}

function listenToKeys(page) {
  document.addEventListener("keydown", (event) => {
    const act = event.ctrlKey || event.metaKey || event.altKey ? undefined : keysAt(event.target, page)[event.key];
    if (!act) return;
    event.preventDefault();
    unhover(page);
    act(page);
  });
}

function keysAt(target, page) {
  if (target.closest("input, select")) return {};
  if (target.closest("#panel")) return KEYS_IN_PANEL;
  return target === page.canvas || target === document.body ? KEYS_IN_TREE : KEYS;
}

const KEYS = { "/": () => byId("query").select() };

const KEYS_IN_PANEL = { ...KEYS, Escape: (page) => page.deselect() };

const KEYS_IN_TREE = {
  ...KEYS,
  ArrowUp: (page) => go(page, page.tree.parent[page.selected]),
  ArrowDown: (page) => go(page, page.tree.children(page.selected ?? page.tree.root)[0]),
  ArrowLeft: (page) => go(page, page.tree.sibling(page.selected, -1)),
  ArrowRight: (page) => go(page, page.tree.sibling(page.selected, 1)),
  Enter: (page) => page.selected !== undefined && page.zoomInto(page.selected),
  Escape: (page) => page.zoomOut(),
  Home: (page) => page.zoomInto(page.tree.root),
  "+": (page) => page.goTo(page.view.zoomed(KEY_STEP, 0.5)),
  "=": (page) => page.goTo(page.view.zoomed(KEY_STEP, 0.5)),
  "-": (page) => page.goTo(page.view.zoomed(1 / KEY_STEP, 0.5)),
};

/** Select the next segment, the first of all if none is selected; none beyond the ends. */
function go(page, node) {
  const { tree } = page;
  const next = page.selected === undefined ? tree.children(page.view.node)[0] : node;
  if (next !== undefined && next !== tree.root) page.select(next);
}

function listenToSearch(page) {
  const query = byId("query");
  let typing;
  query.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => page.search(query.value), TYPING_MILLISECONDS);
  });
  query.addEventListener("keydown", (event) => {
    if (event.key === "Enter") {
      clearTimeout(typing);
      if ((page.matches?.query ?? "") !== query.value) page.search(query.value);
      page.step(event.shiftKey ? -1 : 1);
    } else if (event.key === "Escape") {
      query.value = "";
      page.search("");
      page.canvas.focus();
    }
  });
  byId("next").addEventListener("click", () => page.step(1));
  byId("previous").addEventListener("click", () => page.step(-1));
}
