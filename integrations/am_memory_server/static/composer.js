// The box in which a message is written: its height, its draft, and the texts that are attached to it.

import { draftOf, saveDraft } from "./store.js";

const byId = (id) => document.getElementById(id);
const MAX_FILE_BYTES = 2 ** 20;

export class Composer {
  #name = "";
  #files = [];

  /** @param actions `send(text, files)`; `fail(text)` shows a problem. */
  constructor(actions) {
    this.input = byId("input");
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      const files = this.#files;
      if (!actions.send(this.input.value, files)) return;
      this.#attach([]);
      this.write("");
    });
    this.input.addEventListener("input", () => {
      this.#grow();
      saveDraft(this.#name, this.input.value);
    });
    this.input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      byId("composer").requestSubmit();
    });
    byId("attach").addEventListener("click", () => byId("files").click());
    byId("files").addEventListener("change", async () => {
      const chosen = [...byId("files").files];
      byId("files").value = "";
      const read = await Promise.all(chosen.map((file) => textOf(file).catch((error) => { actions.fail(error.message); return null; })));
      this.#attach([...this.#files, ...read.filter(Boolean)]);
    });
  }

  /** Show the draft of a conversation; the first message of a new one has the name "new". */
  open(name) {
    this.#name = name;
    this.#attach([]);
    this.input.value = draftOf(name);
    this.#grow();
  }

  /** The draft is another conversation's from now on: a new one has got its first message. */
  belongTo(name) {
    saveDraft(this.#name, "");
    this.#name = name;
  }

  write(text) {
    this.input.value = text;
    saveDraft(this.#name, text);
    this.#grow();
  }

  focus() {
    this.input.focus();
  }

  #attach(files) {
    this.#files = files;
    byId("attached").hidden = !files.length;
    byId("attached").replaceChildren(...files.map((file) => {
      const item = document.createElement("li"), button = document.createElement("button");
      button.type = "button";
      button.textContent = "×";
      button.setAttribute("aria-label", `Remove ${file.name}`);
      button.addEventListener("click", () => this.#attach(this.#files.filter((other) => other !== file)));
      item.append(file.name, button);
      return item;
    }));
  }

  #grow() {
    this.input.style.height = "auto";
    this.input.style.height = `${this.input.scrollHeight}px`;
  }
}

/** The text of a file. A file that is no text, or is large, is refused: this model reads text only. */
export async function textOf(file) {
  if (file.size > MAX_FILE_BYTES) throw new Error(`${file.name} is larger than 1 MiB: attach a part of it.`);
  const bytes = await file.arrayBuffer();
  try {
    return { name: file.name, text: new TextDecoder("utf-8", { fatal: true }).decode(bytes).replaceAll("\0", "") };
  } catch {
    throw new Error(`${file.name} is not a text file: this model reads text only.`);
  }
}
