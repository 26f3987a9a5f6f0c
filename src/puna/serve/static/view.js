// Elements. Text becomes text nodes and the server's nested arrays become elements of a known few kinds: no string is
// ever parsed as HTML, and the page's policy (require-trusted-types-for) holds it to that.

import * as api from "./api.js";

const TAGS = new Set(
  "p h3 strong em s blockquote ul ol li table thead tbody tr th td hr br pre code span small".split(" "),
);
const MILLISECONDS_BETWEEN_DRAWINGS = 300;
const drawn = new Map();

/** An element with properties, attributes (`aria-...`, `data-...`) and children. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-")) made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

export function button(label, action, properties = {}) {
  return element("button", { type: "button", textContent: label, onclick: action, ...properties });
}

/** The elements of a tree that /chat/markdown gave. */
export function fromTree(nodes) {
  return nodes.map((node) => {
    if (typeof node === "string") return node;
    const [tag, attributes, ...children] = node;
    if (!TAGS.has(tag)) throw new Error(`no element ${tag} is expected`);
    const made = element(tag, {}, ...fromTree(children));
    if (attributes.class === "link") made.className = "link";
    if (Number.isInteger(attributes.start)) made.start = attributes.start;
    if (tag === "pre") return codeBlock(made);
    if (tag === "table") return element("div", { className: "scroll", tabIndex: 0 }, made);
    return made;
  });
}

function codeBlock(pre) {
  pre.tabIndex = 0;
  return element("div", { className: "code" }, copyButton(() => pre.textContent), pre);
}

/** Browsers have a clipboard for pages of this machine and of https alone; elsewhere the old way works. */
async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = element("textarea", { value: text });
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

export function copyButton(text) {
  return button("Copy", async (event) => {
    const pressed = event.currentTarget;
    await copy(text());
    pressed.textContent = "Copied";
    setTimeout(() => (pressed.textContent = "Copy"), 1500);
  });
}

/** A place for an answer: what has been drawn as Markdown, and after it, as plain text, what came since. */
export class Answer {
  constructor() {
    this.body = element("div", { className: "markdown" });
    this.tail = element("span", { className: "tail" });
    this.element = element("div", { className: "text" }, this.body, this.tail);
    this.length = 0;
    this.text = "";
    this.last = 0;
  }

  /** Show a text that goes on, at once as it is, and now and then drawn. */
  update(text) {
    this.text = text;
    this.tail.textContent = text.slice(this.length);
    if (text && Date.now() - this.last > MILLISECONDS_BETWEEN_DRAWINGS) this.draw();
  }

  /** Draw all of the text there is. Where that fails, it stands there plain. */
  async draw() {
    const text = this.text;
    this.last = Infinity;
    try {
      if (!drawn.has(text)) drawn.set(text, await api.markdown(text));
      if (drawn.size > 200) drawn.delete(drawn.keys().next().value);
      if (text.length < this.length) return;
      this.body.replaceChildren(...fromTree(drawn.get(text) ?? [text]));
      this.length = text.length;
      this.tail.textContent = this.text.slice(this.length);
    } catch (error) {
      if (!(error instanceof api.Refusal)) throw error;
    } finally {
      this.last = Date.now();
    }
  }
}
