// Requests to the server: OpenAI's API and the memory endpoints.

export class ApiError extends Error {
  constructor(status, body) {
    super(body?.error?.message ?? `The server answered with status ${status}.`);
    this.status = status;
    this.code = body?.error?.code;
  }
}

/** No answer at all: the server is not there, or the connection broke. */
export class Unreachable extends Error {
  constructor() {
    super("The server does not answer. Check that it runs and that this machine reaches it, then try again.");
  }
}

/** Browsers name a lost connection each in their own words, such as "Failed to fetch". */
async function connected(answer) {
  try {
    return await answer;
  } catch (error) {
    throw error instanceof TypeError ? new Unreachable() : error;
  }
}

export class Api {
  key = "";

  async request(path, options = {}) {
    const headers = { ...(options.body ? { "Content-Type": "application/json" } : {}), ...(this.key ? { Authorization: `Bearer ${this.key}` } : {}) };
    const response = await connected(fetch(path, { ...options, headers }));
    if (!response.ok) throw new ApiError(response.status, await response.json().catch(() => null));
    return response;
  }

  async model() {
    return (await (await this.request("/v1/models")).json()).data[0].id;
  }

  async memory(id) {
    return (await this.request(`/v1/memory/sessions/${encodeURIComponent(id)}`)).json();
  }

  async compact(id) {
    return this.#ask(id, "compact", {});
  }

  /** The text of the tokens [start, end); of a long span, how it begins. */
  async text(id, { start, end }) {
    return this.#ask(id, "text", { start, end });
  }

  /** The compacted spans that a query is about, the best first. */
  async search(id, query) {
    return (await this.#ask(id, "search", { query })).data;
  }

  /** Make the tokens [start, end) exact again; returns the memory. */
  async recall(id, { start, end }) {
    return this.#ask(id, "recall", { start, end });
  }

  async #ask(id, what, body) {
    return (await this.request(`/v1/memory/sessions/${encodeURIComponent(id)}/${what}`, { method: "POST", body: JSON.stringify(body) })).json();
  }

  /** Give a copy of the conversation its own name. A conversation that the server does not know needs no copy. */
  async fork(id, newId) {
    await this.request(`/v1/memory/sessions/${encodeURIComponent(id)}/fork`, { method: "POST", body: JSON.stringify({ id: newId }) }).catch((error) => {
      if (error.status !== 404) throw error;
    });
  }

  async forget(id) {
    await this.request(`/v1/memory/sessions/${encodeURIComponent(id)}`, { method: "DELETE" }).catch((error) => {
      if (error.status !== 404) throw error;
    });
  }

  /** The chunks of an answer, as they arrive. */
  async *chat(body, signal) {
    const response = await this.request("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (let read; !(read = await connected(reader.read())).done; ) {
      const events = (text + read.value).split("\n\n");
      text = events.pop();
      for (const event of events) {
        if (!event.startsWith("data: ")) continue;
        if (event === "data: [DONE]") return;
        const chunk = JSON.parse(event.slice(6));
        if (chunk.error) throw new ApiError(200, chunk);
        yield chunk;
      }
    }
    throw new Error("The connection ended before the answer did. Try again.");
  }
}
