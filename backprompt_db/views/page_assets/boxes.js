// What of a view is drawn: a box for each node that is at least a pixel wide, one for all that are narrower side by side.

const MIN_WIDTH = 1;

/** The boxes of a view on `width` pixels and `numRows` rows, as `{node, x, width, row, places}`.
 *
 * A box with `places` stands for the nodes at these places of the tree's order, and its `node` is the one above them.
 * Heaviest children come first, so that behind the first narrow one all are: no others are looked at.
 */
export function boxesOf(view, width, numRows) {
  const { tree } = view;
  const scale = width / view.span;
  const boxes = [];
  const stack = [];
  const add = (node, left, right, depth, places) => {
    const x = Math.max(-1, (left - view.left) * scale);
    boxes.push({ node, x, width: Math.min(width + 1, (right - view.left) * scale) - x, row: depth - view.top, places });
  };
  const visit = (node) => {
    if (tree.depth[node] - view.top > -1) add(node, tree.left[node], tree.right(node), tree.depth[node]);
    if (tree.depth[node] - view.top < numRows - 1) stack.push(node);
  };
  visit(tree.root);
  while (stack.length) {
    const above = stack.pop();
    const end = tree.begin[above + 1];
    for (let place = tree.firstBehind(above, view.left); place < end; place++) {
      const node = tree.order[place];
      if (tree.left[node] >= view.right || !tree.total[node]) break;
      if (tree.total[node] * scale < MIN_WIDTH) {
        const depth = tree.depth[node];
        if (depth - view.top > -1) add(above, tree.left[node], tree.right(tree.order[end - 1]), depth, [place, end]);
        break;
      }
      visit(node);
    }
  }
  return boxes;
}

/** The box at a point, in pixels and in rows. */
export function boxAt(boxes, x, row) {
  return boxes.find((box) => box.row <= row && row < box.row + 1 && box.x <= x && x < box.x + box.width);
}
