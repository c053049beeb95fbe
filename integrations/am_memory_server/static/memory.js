// The memory panel: a gauge, the strip of segments, the map of slots, the list of compactions.

import { bytes, count, gauge, inWords, mib, percent, seconds } from "./figures.js";

const byId = (id) => document.getElementById(id);
const CUTS_WIDTH = 18;

const EMPTY = {
  stats: { logical_tokens: 0, kv_tokens: 0, exact_tokens: 0, kv_bytes: 0, exact_kv_bytes: 0, num_compactions: 0, num_segments: 0, recalled_tokens: 0 },
  segments: [], recalled: [], mounts: [], compactions: [], layers: [], trigger_tokens: 0,
};

export class MemoryView {
  #memory = EMPTY;

  /** @param actions `choose(part)`: a segment was clicked. */
  constructor(actions) {
    this.actions = actions;
  }

  /** Show the whole memory of a conversation; null: an empty one. */
  show(memory) {
    this.#memory = memory ?? { ...EMPTY, trigger_tokens: this.#memory.trigger_tokens };
    this.#gauge(this.#memory.stats);
    this.#strip();
    this.#heat();
    this.#log();
    this.#notes();
    byId("compact").disabled = !memory;
  }

  /**
   * Update the sizes while an answer is streamed.
   *
   * @param changed the pages that are exact for now, and the trigger, where an update has them.
   */
  resize(stats, { recalled = this.#memory.recalled, trigger_tokens = this.#memory.trigger_tokens } = {}) {
    this.#memory = { ...this.#memory, stats, recalled, trigger_tokens };
    this.#gauge(stats);
    this.#strip();
  }

  /** Show the current activity. */
  say(text, isBusy = false) {
    byId("activity").textContent = text;
    byId("activity").classList.toggle("busy", isBusy);
  }

  #gauge(stats) {
    const trigger = this.#memory.trigger_tokens;
    const shown = gauge(stats, trigger, this.#memory.segments.find((part) => part.kind === "pinned")?.slots ?? 0);
    for (const [kind, width] of Object.entries(shown.widths)) byId("gauge").querySelector(`.${kind}`).style.width = `${width}%`;
    byId("gauge").setAttribute("aria-valuenow", Math.round(stats.kv_tokens));
    byId("gauge").setAttribute("aria-valuemax", trigger || Math.max(Math.round(stats.kv_tokens), 1));
    byId("gauge").setAttribute("aria-valuetext", shown.spoken);
    byId("physical").textContent = count(stats.kv_tokens);
    byId("logical").textContent = count(stats.logical_tokens);
    byId("gauge-left").textContent = shown.left;
    byId("gauge-right").textContent = shown.right;
    const size = bytes(stats);
    byId("bytes-held").textContent = size.held;
    byId("bytes-full").textContent = size.uncompacted;
    ["bytes-bar", "bytes-full-bar"].forEach((bar, number) => { byId(bar).style.width = `${size.widths[number]}%`; });
    byId("pill-text").textContent = stats.logical_tokens ? `${count(stats.kv_tokens)} of ${count(stats.logical_tokens)}` : "Memory";
    byId("toggle-memory").setAttribute("aria-label", stats.logical_tokens ? `${count(stats.kv_tokens)} of ${count(stats.logical_tokens)} tokens of the conversation are in the cache` : "Memory");
  }

  /** The segments, with the exact tail at its current length. */
  #parts() {
    const parts = this.#memory.segments.filter((part) => part.kind !== "exact");
    const start = parts.at(-1)?.end ?? 0, end = this.#memory.stats.logical_tokens;
    return end > start ? [...parts, { kind: "exact", start, end, slots: end - start, num_cuts: 0 }] : parts;
  }

  #strip() {
    const strip = byId("strip"), parts = this.#parts();
    while (strip.children.length > parts.length) strip.lastChild.remove();
    parts.forEach((part, number) => {
      let item = strip.children[number];
      if (!item) {
        item = document.createElement("li");
        telling(item, "strip", () => item.title);
        item.append(document.createElement("i"), Object.assign(document.createElement("span"), { className: "cuts" }), Object.assign(document.createElement("button"), { className: "choose" }));
        strip.append(item);
      }
      const [fill, cuts, button] = item.children, tokens = part.end - part.start, share = part.slots / tokens;
      const kept = part.kind === "compacted" ? `compacted to ${part.slots.toFixed(1)} slots a head, ${percent(share)}` : part.kind;
      const pages = part.kind === "compacted" ? this.#memory.recalled.filter((page) => part.start <= page.start && page.end <= part.end) : [];
      const back = pages.map((page) => `${count(page.start)} to ${count(page.end)}`).join(", ");
      const said = part.text ? `. “${part.text}”` : "";
      const text = `tokens ${count(part.start)} to ${count(part.end)}: ${kept}${part.num_cuts ? `, cut ${part.num_cuts} times` : ""}${part.is_refined ? ", refined" : ""}${back ? `; exact for now: ${back}` : ""}${said}`;
      item.className = part.kind;
      item.style.flexGrow = tokens;
      item.title = button.ariaLabel = text;
      button.onclick = () => this.actions.choose(part);
      fill.style.height = `${Math.max(100 * share, 4)}%`;
      item.querySelectorAll(".page").forEach((page) => page.remove());
      item.append(...pages.map((page) => {
        const mark = Object.assign(document.createElement("b"), { className: "page" });
        mark.style.left = `${(100 * (page.start - part.start)) / tokens}%`;
        mark.style.width = `${(100 * (page.end - page.start)) / tokens}%`;
        return mark;
      }));
      const width = (strip.clientWidth * tokens) / Math.max(parts.at(-1).end, 1);
      cuts.textContent = part.num_cuts && width >= CUTS_WIDTH ? part.num_cuts : "";
    });
    caption("strip", "0", parts.length ? `${count(parts.at(-1).end)} tokens` : "");
  }

  /** The texts that are mounted, and how many segments were refined: a line each, if there are any. */
  #notes() {
    const compacted = this.#memory.segments.filter((part) => part.kind === "compacted");
    const refined = compacted.filter((part) => part.is_refined).length;
    const texts = this.#memory.mounts.map((text) => `${text.id} (${count(text.num_slots)} slots)`).join(", ");
    byId("words").replaceChildren(...inWords(this.#memory).map((text) => Object.assign(document.createElement("li"), { textContent: text })));
    note("mounted", texts && `Mounted beside the conversation: ${texts}`);
    note("refined", refined ? `${count(refined)} of ${count(compacted.length)} segments refined since they were compacted` : "");
  }

  #heat() {
    const layers = this.#memory.layers.filter((layer) => layer.kind === "full");
    const box = byId("heat"), most = Math.max(0, ...layers.flatMap((layer) => layer.slots));
    box.replaceChildren();
    if (most) caption("heat", `layer ${layers[0].index}`, `most: ${count(most)} slots · layer ${layers.at(-1).index}`);
    else caption("heat", "no compact slots yet", "");
    if (!most) return;
    const heads = layers[0].slots.length, cell = 10, height = Math.max(cell, Math.ceil((layers.length * cell) / 4.5 / heads));
    const svg = svgElement("svg", { viewBox: `0 0 ${layers.length * cell} ${heads * height}`, role: "img" });
    const busiest = layers.reduce((one, other) => (Math.max(...other.slots) > Math.max(...one.slots) ? other : one));
    svg.setAttribute("aria-label", `Compact slots of ${heads} heads in ${layers.length} layers; layer ${busiest.index} has the most, ${count(most)} in one head`);
    layers.forEach((layer, column) => layer.slots.forEach((slots, head) => {
      const cellOf = svgElement("rect", { x: column * cell + 0.5, y: head * height + 0.5, width: cell - 1, height: height - 1, rx: 1.5 });
      if (slots) cellOf.style.fillOpacity = 0.1 + 0.9 * Math.sqrt(slots / most);
      else cellOf.classList.add("none");
      const text = `layer ${layer.index}, head ${head}: ${count(slots)} slots, ${mib(layer.bytes[head])}`;
      cellOf.append(Object.assign(svgElement("title"), { textContent: text }));
      telling(cellOf, "heat", () => text);
      svg.append(cellOf);
    }));
    box.append(svg);
  }

  #log() {
    byId("log").replaceChildren(...this.#memory.compactions.toReversed().map((made) => {
      const item = document.createElement("li");
      const line = (text, name = "span", className = "") => item.append(Object.assign(document.createElement(name), { textContent: text, className }));
      line(`${count(made.start)}–${count(made.end)} → ${made.num_slots.toFixed(0)} slots`);
      line(seconds(made.seconds), "span", "right");
      line(`${count(made.kv_tokens_before)} → ${count(made.kv_tokens_after)} in the cache`, "small");
      
      item.title = `attention mass error ${percent(made.mass_error)}, output error ${percent(made.output_error)}; ${new Date(made.created * 1000).toLocaleTimeString()}`;
      return item;
    }));
  }
}

/** Show a line, or none. */
function note(name, text) {
  byId(name).textContent = text;
  byId(name).hidden = !text;
}

const captions = {};

function caption(name, left, right) {
  captions[name] = [left, right];
  write(name, left, right);
}

function write(name, left, right) {
  byId(`${name}-left`).textContent = left;
  byId(`${name}-right`).textContent = right;
}

/** Show the title of the element under the pointer in place of the captions; after a touch it stays. */
function telling(item, name, text) {
  item.addEventListener("pointerenter", () => write(name, text(), ""));
  item.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") write(name, ...captions[name]); });
}

function svgElement(name, attributes = {}) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}
