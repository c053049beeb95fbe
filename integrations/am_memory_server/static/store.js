// Conversations and settings in the browser's database; without a database they last as long as the page.

const STORE = "conversations";

function finished(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

export class ConversationStore {
  #database = null;
  #fallback = new Map();

  async open() {
    try {
      const request = indexedDB.open("am-memory", 1);
      request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
      this.#database = await finished(request);
    } catch {
      this.#database = null;
    }
    return this;
  }

  #store(mode) {
    return this.#database.transaction(STORE, mode).objectStore(STORE);
  }

  /** All conversations, the most recently used first. */
  async all() {
    const found = this.#database ? await finished(this.#store("readonly").getAll()) : [...this.#fallback.values()];
    return found.sort((one, other) => other.updated - one.updated);
  }

  async put(conversation) {
    const copy = structuredClone(conversation);
    if (this.#database) await finished(this.#store("readwrite").put(copy));
    else this.#fallback.set(copy.id, copy);
  }

  async remove(id) {
    if (this.#database) await finished(this.#store("readwrite").delete(id));
    else this.#fallback.delete(id);
  }
}

const SETTINGS = "am-memory.settings";

export function loadSettings() {
  try {
    return { key: "", theme: "", temperature: "", maxTokens: "", current: "", ...JSON.parse(localStorage.getItem(SETTINGS) ?? "{}") };
  } catch {
    return { key: "", theme: "", temperature: "", maxTokens: "", current: "" };
  }
}

export function saveSettings(settings) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
  } catch { /* no storage: they last as long as the page */ }
}
