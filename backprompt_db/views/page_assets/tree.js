// Every segment below the first of its parents, and all of them below one root; laid out from left to right by a weight.

/** The tree, and where each node lies once it is arranged. Nodes are numbers; the root is `size`. */
export class Tree {
  /** `parents`: of each node the number of the node it stands below, which is smaller than its own, or -1. */
  constructor(parents) {
    this.size = this.root = parents.length;
    this.parent = Int32Array.from([...parents, -1], (parent, node) => (parent < 0 && node < this.size ? this.size : parent));
    this.depth = new Int32Array(this.size + 1);
    this.begin = new Int32Array(this.size + 2); // the children of a node are order[begin[node]] to order[begin[node + 1]]
    this.order = new Int32Array(this.size);
    this.left = new Float64Array(this.size + 1);
    this.total = new Float64Array(this.size + 1);
    this.below = this.sums(new Uint8Array(this.size).fill(1)); // nodes in each subtree, its top included
    this.#link();
    this.maxDepth = this.depth.reduce((deepest, depth) => Math.max(deepest, depth), 0);
  }

  #link() {
    for (let node = 0; node < this.size; node++) {
      this.depth[node] = (this.parent[node] === this.root ? 0 : this.depth[this.parent[node]]) + 1;
      this.begin[this.parent[node] + 1]++;
    }
    for (let node = 0; node <= this.size; node++) this.begin[node + 1] += this.begin[node];
    const next = this.begin.slice();
    for (let node = 0; node < this.size; node++) this.order[next[this.parent[node]]++] = node;
  }

  /** Sum of the weights in each subtree. */
  sums(weights) {
    const totals = new Float64Array(this.size + 1);
    totals.set(weights);
    for (let node = this.size - 1; node >= 0; node--) totals[this.parent[node]] += totals[node];
    return totals;
  }

  /** Give each node the width of its subtree's weights; the heaviest children come first. */
  arrange(weights) {
    this.total = this.sums(weights);
    const heavier = (one, other) => this.total[other] - this.total[one] || one - other;
    for (let node = 0; node <= this.size; node++) this.order.subarray(this.begin[node], this.begin[node + 1]).sort(heavier);
    this.#place(this.root, 0);
    for (let node = 0; node < this.size; node++) this.#place(node, this.left[node]);
  }

  #place(node, left) {
    this.left[node] = left;
    for (const child of this.children(node)) {
      this.left[child] = left;
      left += this.total[child];
    }
  }

  /** The nodes below one, the heaviest first. */
  children(node) {
    return this.order.subarray(this.begin[node], this.begin[node + 1]);
  }

  right(node) {
    return this.left[node] + this.total[node];
  }

  /** The place in `order` of the first child of a node that ends behind `x`. */
  firstBehind(node, x) {
    let [low, high] = [this.begin[node], this.begin[node + 1]];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.right(this.order[middle]) > x) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  /** The child of a node that lies at `x`, if one does. */
  childAt(node, x) {
    const child = this.order[this.firstBehind(node, x)];
    return child !== undefined && this.parent[child] === node && this.left[child] <= x ? child : undefined;
  }

  /** The nodes from the root down to one. */
  path(node) {
    const nodes = [];
    for (; node >= 0; node = this.parent[node]) nodes.push(node);
    return nodes.reverse();
  }

  /** The sibling so many places further, if there is one. */
  sibling(node, step) {
    const siblings = node === this.root ? [] : this.children(this.parent[node]);
    return siblings[siblings.indexOf(node) + step];
  }
}
