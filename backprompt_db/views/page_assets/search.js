// Which texts contain what is searched for, upper or lower case.

/** What matches a string in any case, or nothing for an empty one. */
export function patternOf(query, flags = "iu") {
  return query ? new RegExp(query.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"), flags) : null;
}

/** The segments in which a string occurs, from left to right and top to bottom. */
export class Matches {
  constructor(tree, texts, query) {
    this.query = query;
    const pattern = patternOf(query);
    this.has = Uint8Array.from(texts, (text) => (pattern.test(text) ? 1 : 0));
    this.arrange(tree);
  }

  /** Count them in the order that the tree has by now. */
  arrange(tree) {
    this.below = tree.sums(this.has);
    this.before = new Int32Array(tree.size + 1); // matches in the subtrees of order[0] to order[place - 1]
    for (let place = 0; place < tree.size; place++) this.before[place + 1] = this.before[place] + this.below[tree.order[place]];
    this.nodes = [...this.has.keys()].filter((node) => this.has[node]);
    this.nodes.sort((one, other) => tree.left[one] - tree.left[other] || tree.depth[one] - tree.depth[other]);
  }

  get count() {
    return this.nodes.length;
  }

  /** How many there are in and below the nodes at some places of the tree's order. */
  among([begin, end]) {
    return this.before[end] - this.before[begin];
  }

  /** The match so many steps after the one at which somebody is, or the first or last of all. */
  step(node, steps) {
    const place = this.nodes.indexOf(node);
    if (place < 0) return steps > 0 ? this.nodes[0] : this.nodes.at(-1);
    return this.nodes.at((place + steps) % this.count);
  }
}

/** Highlight what was searched for in an element, whatever elements it is divided into; return the first range of it. */
export function highlight(element, query) {
  globalThis.CSS?.highlights?.delete("found");
  const pattern = patternOf(query, "giu");
  if (!pattern) return undefined;
  const pieces = textNodes(element);
  const found = [...pieces.map(({ node }) => node.data).join("").matchAll(pattern)];
  const ranges = rangesOf(pieces, found);
  if (globalThis.Highlight) CSS.highlights.set("found", new Highlight(...ranges));
  return ranges[0];
}

function textNodes(element) {
  const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
  const pieces = [];
  for (let begin = 0; walker.nextNode(); begin += walker.currentNode.data.length) pieces.push({ node: walker.currentNode, begin });
  return pieces;
}

/** The ranges of matches, which come in order: so the pieces are gone through once, however many there are. */
function rangesOf(pieces, found) {
  let at = 0;
  const pieceAt = (place) => {
    while (at + 1 < pieces.length && pieces[at + 1].begin <= place) at++;
    return pieces[at];
  };
  return found.map(({ index, 0: { length } }) => {
    const range = new Range();
    const first = pieceAt(index);
    const last = pieceAt(index + length - 1);
    range.setStart(first.node, index - first.begin);
    range.setEnd(last.node, index + length - last.begin);
    return range;
  });
}
