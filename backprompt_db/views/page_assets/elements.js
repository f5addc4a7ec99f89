// Elements of the document. Texts are only ever set as text, never as markup.

/** A new element with attributes and children; strings become text. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  made.append(...children);
  return made;
}

/** A button that says something and does something. */
export function button(words, act, attributes = {}) {
  const made = element("button", { type: "button", dir: "auto", ...attributes }, words);
  made.addEventListener("click", act);
  return made;
}

/** The element of this page with an id. */
export function byId(id) {
  return document.getElementById(id);
}
