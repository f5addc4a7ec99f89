// Which part of the tree is looked at: from `left` to `right` in weights, from the row `top` down.

const MAX_ZOOM = 1e9;

/** A part of a tree. It is never changed: moving gives another one. */
export class View {
  constructor(tree, left = 0, right = tree.total[tree.root], top = 0) {
    const whole = tree.total[tree.root];
    const span = Math.min(Math.max(right - left, whole / MAX_ZOOM), whole);
    this.tree = tree;
    this.left = Math.min(Math.max(0, left), whole - span);
    this.right = this.left + span;
    this.top = Math.min(Math.max(0, top), tree.maxDepth);
  }

  get span() {
    return this.right - this.left;
  }

  /** The view that a node fills, in the first row. */
  onto(node) {
    return new View(this.tree, this.tree.left[node], this.tree.right(node), this.tree.depth[node]);
  }

  /** Zoom by a factor, where `share` of the width stays in place. */
  zoomed(factor, share) {
    const fixed = this.left + this.span * share;
    const span = Math.min(this.span / factor, this.tree.total[this.tree.root]);
    return new View(this.tree, fixed - span * share, fixed + span * (1 - share), this.top);
  }

  /** Moved by shares of the width, and by rows. */
  moved(shares, rows) {
    const left = this.left + this.span * shares;
    return new View(this.tree, left, left + this.span, this.top + rows);
  }

  /** The nearest view in which a node can be seen and is not narrower than a share of the width. */
  showing(node, { numRows, minShare }) {
    const { left, total, depth } = this.tree;
    const row = depth[node] - this.top;
    const top = row < 0 ? depth[node] : row > numRows - 2 ? depth[node] - numRows + 2 : this.top;
    const isSeen = left[node] < this.right && this.tree.right(node) > this.left;
    const isWide = total[node] >= this.span * minShare;
    if (isSeen && isWide) return new View(this.tree, this.left, this.right, top);
    const span = isWide ? this.span : total[node] / minShare;
    const middle = left[node] + total[node] / 2;
    return new View(this.tree, middle - span / 2, middle + span / 2, top);
  }

  /** A view on the way to another one. */
  towards(other, share) {
    const mixed = (one, another) => one + (another - one) * share;
    return new View(this.tree, mixed(this.left, other.left), mixed(this.right, other.right), mixed(this.top, other.top));
  }

  /** The lowest node that fills the whole width, or the whole of which fills it. */
  get node() {
    const [tree, slack] = [this.tree, this.span * 1e-6];
    let node = tree.root;
    while (true) {
      const child = tree.childAt(node, this.left + this.span / 2);
      if (child === undefined || tree.left[child] > this.left + slack || tree.right(child) < this.right - slack) return node;
      if (tree.depth[child] > this.top + slack) return node;
      node = child;
    }
  }
}
