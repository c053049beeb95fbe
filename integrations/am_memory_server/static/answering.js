// One answer while it is streamed: its text, its reasoning, and what the memory does meanwhile.

const SAVE_EVERY_MS = 2000;
const STAGES = {
  measure: "measuring how the model repeats a text, once", predict: "predicting how it repeats the block", repeat: "repeating the block",
  self_study: "asking itself about the block", summary: "summarizing the block", score: "scoring its keys", fit: "fitting its heads",
};
const number = (value) => value.toLocaleString("en");

export class Answering {
  #stopping = new AbortController();
  #compacting = "";

  /** @param parts the page's `api`, `chat` and `memory`, `save(conversation)`, and `say(text)` for screen readers. */
  constructor(parts) {
    Object.assign(this, parts);
  }

  stop() {
    this.#stopping.abort();
  }

  /**
   * Stream an answer into a message and its node.
   *
   * @param body the request.
   * @param isShown whether the conversation is still on the page.
   * @returns null, or the error that ended the answer.
   */
  async run(conversation, message, node, body, isShown) {
    const saving = setInterval(() => { if (message.content) this.save(conversation); }, SAVE_EVERY_MS);
    const before = message.content;
    delete message.note;
    delete message.isCut;
    try {
      for await (const chunk of this.api.chat(body, this.#stopping.signal)) this.#take(chunk, message, node, isShown);
      if (message.content === before && !message.isCut) message.note = "the model ended without a word";
      this.say("The answer is complete.");
      return null;
    } catch (error) {
      if (message.content) message.isCut = true;
      if (!this.#stopping.signal.aborted) return error;
      message.note = "stopped";
      this.say("Stopped.");
      return null;
    } finally {
      clearInterval(saving);
      this.chat.waiting(node, "");
    }
  }

  #take(chunk, message, node, isShown) {
    if (chunk.am_memory && isShown()) this.#remember(chunk.am_memory, message, node);
    const choice = chunk.choices[0];
    if (!choice) return;
    const { content, reasoning_content: reasoning } = choice.delta;
    if (reasoning) message.reasoning = (message.reasoning ?? "") + reasoning;
    if (content) message.content += content;
    if (content || reasoning) this.chat.update(node, message);
    if (choice.finish_reason === "length") {
      message.note = "cut off at the longest answer allowed";
      message.isCut = Boolean(message.content);
    }
  }

  /** What the memory does: in its panel, and where the answer will stand. */
  #remember(update, message, node) {
    const { memory, chat } = this;
    if (update.stats) memory.resize(update.stats, update);
    if (update.memory) memory.show(update.memory);
    const tell = (text, isBusy) => {
      memory.say(text, isBusy);
      chat.waiting(node, isBusy ? text : "");
    };
    switch (update.event) {
      case "reading":
        if (update.left_tokens) tell(`reading, ${number(update.left_tokens)} tokens left`, true);
        else tell("answering", false);
        break;
      case "compacting":
        this.#compacting = `compacting ${number(update.start)}–${number(update.end)}`;
        tell(this.#compacting, true);
        this.say("Compacting the oldest part of the memory.");
        break;
      case "compaction_progress":
        tell(`${this.#compacting}: ${STAGES[update.stage] ?? update.stage}, ${Math.round((100 * update.done) / update.total)} %`, true);
        break;
      case "compacted":
        tell("answering", false);
        chat.mark(update.report.end - update.report.start, node);
        break;
      case "looked_up":
        message.lookedUp = [...(message.lookedUp ?? []).filter((old) => !update.spans.some(({ start, end }) => old.start === start && old.end === end)), ...update.spans];
        chat.lookedUp(node, message);
        break;
      case "rebuilt":
        tell(`reading ${number(update.num_tokens)} tokens again`, true);
        break;
    }
  }
}
