// Unpack the contents, make the page, and let it be used.

import { COLOURINGS, palette } from "./colours.js";
import { unpack } from "./contents.js";
import { byId, element } from "./elements.js";
import { listen } from "./events.js";
import { Page } from "./page.js";
import { MEASURES } from "./segments.js";

function offer(select, choices, choose) {
  select.append(...Object.entries(choices).map(([value, { name }]) => element("option", { value }, name)));
  select.addEventListener("change", () => choose(select.value));
}

function start(contents) {
  byId("totals").textContent = contents.totals;
  if (!contents.nodes.texts.length) return;
  for (const shown of document.querySelectorAll("#controls, #path, main, footer")) shown.hidden = false;
  byId("remarks").append(...contents.remarks.map((words) => element("li", {}, words)));
  const page = new Page(contents);
  offer(byId("measure"), MEASURES, (measure) => page.measureBy(measure));
  offer(byId("colouring"), COLOURINGS, (colouring) => page.colour(colouring));
  listen(page);
  new ResizeObserver(() => page.redraw()).observe(page.canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    page.palette = palette();
    page.redraw();
  });
}

try {
  start(await unpack(byId("contents")));
  requestAnimationFrame(() => performance.measure("backprompt-db first drawing", { start: 0 }));
} catch (error) {
  byId("totals").textContent = `This browser cannot show the page (${error.message}). One of 2023 or newer can.`;
  throw error;
}
