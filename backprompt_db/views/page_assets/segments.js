// What is known of each segment: the columns of the page's contents, and what follows from them.

import { age, bytes, counted, duration, number } from "./words.js";

const PARTS = { kv: "keys and values", logits: "logits", scores: "scores", continuations: "what may follow" };

/** All segments, by number. */
export class Segments {
  constructor(contents) {
    Object.assign(this, contents.nodes);
    this.contents = contents;
    this.size = this.texts.length;
    this.pinned = new Set(this.pinned);
    this.children = this.#children();
  }

  /** The direct parents of a segment, the one that it is drawn below first. */
  parentsOf(node) {
    return this.parents[node] < 0 ? [] : [this.parents[node], ...(this.other_parents[node] ?? [])];
  }

  /** All segments that directly follow each one, whichever of its parents it is. */
  #children() {
    const children = new Map();
    for (let node = 0; node < this.size; node++) {
      for (const parent of this.parentsOf(node)) {
        if (children.has(parent)) children.get(parent).push(node);
        else children.set(parent, [node]);
      }
    }
    return children;
  }

  childrenOf(node) {
    return this.children.get(node) ?? [];
  }

  /** The sizes of its parts that are stored, by name. */
  sizes(node) {
    const sizes = Object.entries(PARTS).map(([part, name]) => [name, this[`${part}_nbytes`][node]]);
    return sizes.filter(([, nbytes]) => nbytes >= 0);
  }

  nbytes(node) {
    return this.sizes(node).reduce((sum, [, nbytes]) => sum + nbytes, 0);
  }

  savedSeconds(node) {
    return this.num_hits[node] * this.compute_seconds[node];
  }

  /** Seconds since it was used, or made if it never was. */
  unusedSeconds(node) {
    return this.used_seconds[node] < 0 ? this.created_seconds[node] : this.used_seconds[node];
  }

  recency(node) {
    return 0.5 ** (this.unusedSeconds(node) / this.contents.half_life_seconds);
  }

  modelName(node) {
    return this.contents.models[this.models[node]];
  }

  /** Its facts, as names and words. */
  facts(node) {
    const namespace = this.contents.namespaces[this.namespaces[node]];
    const label = this.contents.labels[this.labels[node]];
    const used = this.used_seconds[node];
    return [
      ["address", `${this.addresses[node]}…`],
      ["model", this.modelName(node)],
      ["namespace", namespace],
      ["label", label],
      ["pinned", this.pinned.has(node) ? "yes" : ""],
      ["tokens", number(this.num_tokens[node])],
      ["characters", number(this.shortened[node] ?? [...this.texts[node]].length)],
      ...this.sizes(node).map(([name, nbytes]) => [name, bytes(nbytes)]),
      ["computed in", duration(this.compute_seconds[node])],
      ["hits", number(this.num_hits[node])],
      ["saved", duration(this.savedSeconds(node))],
      ["made", `${age(this.created_seconds[node])} before this page`],
      ["last used", used < 0 ? "never" : `${age(used)} before this page`],
    ].filter(([, words]) => words);
  }
}

/** What a segment can count for: its name, its weight, and how a sum of weights is said. */
export const MEASURES = {
  tokens: { name: "tokens", weight: (segments, node) => segments.num_tokens[node], words: (sum) => counted(sum, "token") },
  bytes: { name: "bytes", weight: (segments, node) => segments.nbytes(node), words: bytes },
  seconds: { name: "seconds saved", weight: (segments, node) => segments.savedSeconds(node), words: (sum) => `${duration(sum)} saved` },
  recency: { name: "last use", weight: (segments, node) => segments.recency(node), words: (sum) => `${number(sum)} by recency` },
};

/** The weights of all segments by one measure. */
export function weightsOf(segments, measure) {
  return Float64Array.from({ length: segments.size }, (_, node) => MEASURES[measure].weight(segments, node));
}
