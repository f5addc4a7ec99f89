// The page: what of the tree is shown, and how.

import { boxesOf } from "./boxes.js";
import { COLOURINGS, classesOf, colourOf, palette } from "./colours.js";
import { ROW_HEIGHT, draw } from "./drawing.js";
import { button, byId, element } from "./elements.js";
import { mirror } from "./mirror.js";
import { fill } from "./panel.js";
import { Matches } from "./search.js";
import { MEASURES, Segments, weightsOf } from "./segments.js";
import { Tree } from "./tree.js";
import { View } from "./view.js";
import { counted, line, number } from "./words.js";

const ZOOM_SECONDS = 0.25;
const MIN_SHARE = 0.04;

/** All that is shown, and the ways to change it. */
export class Page {
  constructor(contents) {
    this.segments = new Segments(contents);
    this.tree = new Tree(this.segments.parents);
    this.title = `All ${counted(this.segments.size, "segment")}`;
    this.canvas = byId("icicle");
    this.panel = byId("panel");
    this.boxes = [];
    this.palette = palette();
    this.colour("state");
    this.measureBy("tokens");
  }

  get rows() {
    return this.canvas.clientHeight / ROW_HEIGHT;
  }

  measureBy(measure) {
    this.measure = measure;
    this.tree.arrange(weightsOf(this.segments, measure));
    this.matches?.arrange(this.tree);
    this.view = new View(this.tree);
    byId("nothing").hidden = this.tree.total[this.tree.root] > 0;
    byId("nothing").textContent = `Nothing to draw by ${MEASURES[measure].name}: choose another width.`;
    if (this.selected !== undefined) this.select(this.selected);
    this.redraw();
  }

  colour(colouring) {
    this.colouring = colouring;
    this.classes = classesOf(this.segments, colouring);
    const classes = COLOURINGS[colouring].classes(this.segments);
    byId("legend").replaceChildren(...classes.map((words, place) => legendItem(words, colourOf(colouring, place))));
    this.redraw();
  }

  /** Draw at the next frame, once however often it is asked for. */
  redraw() {
    this.frame ??= requestAnimationFrame((now) => {
      this.frame = undefined;
      this.#animate(now);
      this.#draw();
    });
  }

  #draw() {
    const began = performance.now();
    this.boxes = this.tree.total[this.tree.root] ? boxesOf(this.view, this.canvas.clientWidth, Math.ceil(this.rows) + 1) : [];
    draw(this.canvas, this.boxes, this, this.palette);
    performance.measure("backprompt-db drawing", { start: began });
    this.#showPath();
    clearTimeout(this.mirroring);
    this.mirroring = setTimeout(() => this.#mirror(), 100);
  }

  /** Say on the canvas what it shows: the measure, the number of boxes, the range in weights; tests read it. */
  #mirror() {
    mirror(this.canvas, this.boxes, this);
    const { left, right, top } = this.view;
    Object.assign(this.canvas.dataset, { measure: this.measure, boxes: this.boxes.length, left, right, top, isReady: true });
  }

  /** Go to a view; slowly, unless somebody wants no motion. */
  goTo(view, { atOnce = matchMedia("(prefers-reduced-motion: reduce)").matches } = {}) {
    this.motion = atOnce ? undefined : { from: this.view, to: view };
    if (atOnce) this.view = view;
    this.redraw();
  }

  #animate(now) {
    if (!this.motion) return;
    const { from, to, began = now } = this.motion;
    const share = Math.min((now - began) / 1000 / ZOOM_SECONDS, 1);
    this.motion = share < 1 ? { from, to, began } : undefined;
    this.view = share < 1 ? from.towards(to, share * (2 - share)) : to;
    if (this.motion) this.redraw();
  }

  #showPath() {
    const node = this.view.node;
    if (node === this.pathNode && this.pathTree === this.tree) return;
    [this.pathNode, this.pathTree] = [node, this.tree];
    const path = this.tree.path(node);
    const shown = path.length > 8 ? [...path.slice(0, 3), undefined, ...path.slice(-4)] : path;
    byId("path").replaceChildren(...shown.flatMap((each) => ["›", this.#step(each, each === node)]).slice(1));
  }

  #step(node, isLast) {
    if (node === undefined) return element("span", {}, "…");
    const words = node === this.tree.root ? this.title : line(this.segments.texts[node], 60);
    return button(words, () => this.zoomInto(node), isLast ? { "aria-current": "true" } : {});
  }

  zoomInto(node) {
    if (this.tree.total[node]) this.goTo(this.view.onto(node));
    this.canvas.focus();
  }

  zoomOut() {
    const { node, span } = this.motion?.to ?? this.view;
    if (node === this.tree.root && span === this.tree.total[node]) this.deselect();
    else this.goTo(this.view.onto(node === this.tree.root ? node : this.tree.parent[node]));
  }

  /** Show all about a segment, and bring it into view if it is not. */
  select(node) {
    this.selected = node;
    this.panel.hidden = node === undefined;
    if (node !== undefined) {
      fill(this.panel, node, { ...this, query: this.matches?.query ?? "", go: (other) => this.select(other), close: () => this.deselect() });
      if (this.tree.total[node]) this.goTo((this.motion?.to ?? this.view).showing(node, { numRows: Math.floor(this.rows), minShare: MIN_SHARE }));
    }
    this.#count();
    this.redraw();
  }

  deselect() {
    this.select(undefined);
    this.canvas.focus();
  }

  search(query) {
    this.matches = query ? new Matches(this.tree, this.segments.texts, query) : undefined;
    if (this.selected !== undefined) this.select(this.selected);
    this.#count();
    this.redraw();
  }

  step(steps) {
    if (this.matches?.count) this.select(this.matches.step(this.selected, steps));
  }

  #count() {
    const count = this.matches?.count ?? 0;
    const place = this.matches ? this.matches.nodes.indexOf(this.selected) : -1;
    const words = place < 0 ? (count ? counted(count, "match", "matches") : "no match") : `${number(place + 1)} of ${number(count)}`;
    byId("found").textContent = this.matches ? words : "";
    for (const id of ["previous", "next"]) byId(id).disabled = !count;
  }
}

function legendItem(words, property) {
  const sample = element("i");
  sample.style.backgroundColor = `var(${property})`;
  return element("li", {}, sample, words);
}
