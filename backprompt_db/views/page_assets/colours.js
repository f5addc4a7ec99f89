// What colours mean: of each colouring the classes with their colours, and the class of a segment.

const NUM_CATEGORIES = 8;
const STEPS = [0, 1, 2, 3, 4].map((step) => `--step${step}`);
const DAY = 86400;

const least = (bounds, value) => bounds.filter((bound) => value >= bound).length;

const categories = (names) => (names.length > NUM_CATEGORIES ? [...names.slice(0, NUM_CATEGORIES - 1), "others"] : names);

/** Every way to colour segments. */
export const COLOURINGS = {
  state: {
    name: "what is stored",
    classes: () => ["keys and values", "logits, no keys and values", "scores only"],
    classOf: (segments, node) => (segments.kv_nbytes[node] >= 0 ? 0 : segments.logits_nbytes[node] >= 0 ? 1 : 2),
  },
  age: {
    name: "last use",
    classes: () => ["longer ago", "used in the last 30 days", "7 days", "24 hours", "hour"],
    classOf: (segments, node) => 4 - least([3600, DAY, 7 * DAY, 30 * DAY], segments.unusedSeconds(node)),
    colours: STEPS,
  },
  model: {
    name: "model",
    classes: ({ contents: { models } }) => categories(models),
    classOf: (segments, node) => Math.min(segments.models[node], NUM_CATEGORIES - 1),
  },
  namespace: {
    name: "namespace",
    classes: ({ contents: { namespaces } }) => categories(namespaces.map((name) => name || "no namespace")),
    classOf: (segments, node) => Math.min(segments.namespaces[node], NUM_CATEGORIES - 1),
  },
  hits: {
    name: "hits",
    classes: () => ["no hits", "1", "2 to 9", "10 to 99", "100 or more"],
    classOf: (segments, node) => least([1, 2, 10, 100], segments.num_hits[node]),
    colours: STEPS,
  },
};

/** The custom property that holds the colour of a class. */
export function colourOf(colouring, number) {
  return COLOURINGS[colouring].colours?.[number] ?? `--category${number}`;
}

/** The class of every segment. */
export function classesOf(segments, colouring) {
  const { classOf } = COLOURINGS[colouring];
  return Uint8Array.from({ length: segments.size }, (_, node) => classOf(segments, node));
}

/** The colours of the page at this moment, light or dark, by name. */
export function palette() {
  const style = getComputedStyle(document.documentElement);
  return new Proxy({}, { get: (known, name) => (known[name] ??= style.getPropertyValue(name).trim()) });
}
