// How numbers, sizes, times and texts are shown to people: as the command line shows them.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
const PERIODS = [[31536000, "y"], [86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];

/** 12345 is "12,345"; 0.012345 is "0.0123". */
export function number(value) {
  return value.toLocaleString("en-US", Number.isInteger(value) ? {} : { maximumSignificantDigits: 3 });
}

/** "1 segment", "2 segments". */
export function counted(count, noun, nouns = `${noun}s`) {
  return `${number(count)} ${count === 1 ? noun : nouns}`;
}

/** 1536 is "1.5 KiB". */
export function bytes(count) {
  const exponent = Math.min(Math.max(0, Math.floor(Math.log2(count || 1) / 10)), UNITS.length - 1);
  return exponent ? `${(count / 1024 ** exponent).toFixed(1)} ${UNITS[exponent]}` : `${count} B`;
}

/** Seconds, in their two largest units. */
export function duration(seconds) {
  if (seconds < 60) return `${number(seconds)} s`;
  const parts = [];
  let rest = Math.floor(seconds);
  for (const [length, unit] of PERIODS) {
    parts.push([Math.floor(rest / length), unit]);
    rest %= length;
  }
  const largest = parts.slice(parts.findIndex(([count]) => count)).slice(0, 2);
  return largest.filter(([count]) => count).map(([count, unit]) => `${count} ${unit}`).join(" ");
}

/** Seconds, in their largest unit. */
export function age(seconds) {
  const [length, unit] = PERIODS.find(([length]) => seconds >= length) ?? [1, "s"];
  return `${Math.floor(seconds / length)} ${unit}`;
}

/** One line of a text: line ends as arrows, other spaces as one, nothing that would not show. */
export function line(text, length) {
  const shown = text.slice(0, length * 2).replace(/\n/g, "↵").replace(/\s+/g, " ").replace(/\p{Cc}|\p{Bidi_Control}/gu, "·");
  const characters = [...shown];
  return characters.length <= length && text.length <= length * 2 ? shown : `${characters.slice(0, length).join("")}…`;
}
