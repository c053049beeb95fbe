// The page: connects conversations, settings and the answer that is being streamed.

import { Answering } from "./answering.js";
import { Api } from "./api.js";
import { asMarkdown, exported, imported } from "./archive.js";
import { ChatView } from "./chat.js";
import { Composer } from "./composer.js";
import { Looking } from "./looking.js";
import { MemoryView } from "./memory.js";
import { Sidebar } from "./sidebar.js";
import { ConversationStore, loadSettings, saveDraft, saveSettings } from "./store.js";
import * as tree from "./tree.js";

const byId = (id) => document.getElementById(id);
const STARTERS = ["Tell me a long story about a lighthouse", "Explain how a bicycle stays upright", "Plan a week of simple dinners"];
const MAX_TITLE = 60, NEW = "new";

const api = new Api(), memory = new MemoryView({ choose: (part) => looking.open(part) }), store = await new ConversationStore().open();
const settings = loadSettings();
const chat = new ChatView({ copy, retry, fork, edit, choose, continue: goOn });
const composer = new Composer({ send, fail: (text) => chat.fail(text) });
const looking = new Looking({ api, id: () => current.id, isBusy: () => running, messages: () => tree.path(current), goTo, recalled });
const sidebar = new Sidebar({ open, forget });
let conversations = await store.all();
let current = null, running = null, model = "";

const newId = () => crypto.randomUUID?.() ?? `${Date.now()}-${Math.random().toString(36).slice(2)}`;
const fresh = () => tree.fresh(newId(), settings);

// Conversations

async function open(conversation) {
  running?.stop();
  current = conversation;
  settings.current = conversation.id;
  saveSettings(settings);
  show();
  looking.clear();
  composer.open(draftName());
  document.querySelector(".app").classList.remove("show-side");
  veil();
  await look();
}

/** A conversation without a message is new: its draft waits for whichever one comes next. */
function draftName() {
  return current.messages.length ? current.id : NEW;
}

/** Show the messages and the title of the current conversation. */
function show() {
  chat.show(tree.path(current), (message) => tree.variants(current, message));
  list();
}

function list() {
  byId("title").value = current.title;
  document.title = current.title ? `${current.title} – am-memory` : "am-memory";
  sidebar.show(conversations, current);
}

async function forget(conversation) {
  if (!confirm(`Delete "${conversation.title || "New conversation"}", here and in the server's memory?`)) return;
  if (conversation === current) running?.stop();
  conversations = conversations.filter((other) => other !== conversation);
  await store.remove(conversation.id);
  saveDraft(conversation.id, "");
  await api.forget(conversation.id).catch((error) => chat.fail(error.message));
  if (conversation === current) await open(conversations[0] ?? fresh());
  else list();
}

async function keep(conversation) {
  conversation.updated = Date.now();
  if (!conversations.includes(conversation)) conversations.unshift(conversation);
  conversations.sort((one, other) => other.updated - one.updated);
  await store.put(conversation).catch((error) => chat.fail(`This conversation is not kept. ${error.message}`));
}

/** Show the server's memory of the current conversation. */
async function look() {
  const { id } = current;
  const found = !current.messages.length ? null : await api.memory(id).catch((error) => {
    if (error.status === 401) askForKey();
    return null;
  });
  if (current.id === id && !running) {
    memory.show(found);
    memory.say("");
  }
}

// Messages

/** Send a message; false if nothing can be sent now. */
function send(text, files = []) {
  const content = text.trim();
  if ((!content && !files.length) || running) return false;
  const message = tree.add(current, tree.path(current).at(-1), { role: "user", content, ...(files.length ? { files } : {}) });
  current.title ||= (content || files[0].name).slice(0, MAX_TITLE).replace(/\s+/g, " ");
  chat.add(message);
  chat.toEnd();
  list();
  composer.belongTo(current.id);
  answer();
  return true;
}

/** Stream the answer to the last message that is shown. */
async function answer() {
  const asked = tree.path(current), message = tree.add(current, asked.at(-1), { role: "assistant", content: "", model });
  await stream(message, chat.add(message, tree.variants(current, message)), asked);
}

/** Go on with an answer that was cut. */
async function goOn(message) {
  if (running) return;
  tree.choose(current, message);
  show();
  const shown = tree.path(current), place = shown.indexOf(message);
  await stream(message, chat.list.querySelectorAll(".message")[place], shown.slice(0, place + 1));
}

async function stream(message, node, asked) {
  const conversation = current, isShown = () => current === conversation;
  running = new Answering({ api, chat, memory, save: keep, say });
  writing(node, true);
  await keep(conversation);
  const failed = await running.run(conversation, message, node, tree.requestBody(conversation, asked), isShown);
  const isNothing = !message.content && !message.reasoning && (failed || message.note === "stopped");
  if (isNothing) tree.remove(conversation, message);
  await keep(conversation);
  running = null;
  writing(node, false);
  if (isShown()) {
    memory.say("");
    if (isNothing) show();
    else chat.finish(node, message, tree.variants(conversation, message));
    list();
    if (failed) chat.fail(failed.message);
    if (failed?.status === 401) askForKey();
  }
}

function writing(node, isWriting) {
  chat.setWriting(node, isWriting);
  byId("send").hidden = isWriting;
  byId("stop").hidden = !isWriting;
  byId("compact").disabled = isWriting;
  if (isWriting) memory.say("waiting for the model", true);
}

/** Answer again: the answers so far stay as variants. */
async function retry(message) {
  if (running) return;
  current.leaf = message.parent;
  show();
  await answer();
}

/** Send another text in the place of a message: the old one stays as a variant. */
function edit(message, content) {
  if (running) return false;
  const parent = current.messages.find(({ id }) => id === message.parent);
  tree.add(current, parent, { role: "user", content, ...(message.files ? { files: message.files } : {}) });
  show();
  answer();
  return true;
}

async function choose(message) {
  if (running) return;
  tree.choose(current, message);
  show();
  await store.put(current);
}

async function fork(message) {
  const branch = tree.forked(current, message, newId());
  await keep(branch);
  const failed = await api.fork(current.id, branch.id).catch((error) => error);
  await open(branch);
  if (failed) chat.fail(failed.message);
}

async function copy(message, button) {
  await navigator.clipboard?.writeText(message.content);
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

// Files

function download(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

async function importFile() {
  const [file] = byId("import-file").files;
  byId("import-file").value = "";
  byId("settings").close();
  try {
    const found = imported(await file.text(), newId);
    await store.put(...found);
    conversations = await store.all();
    await open(conversations.find(({ id }) => id === found[0]?.id) ?? current);
  } catch (error) {
    chat.fail(`Nothing was imported. ${error.message}`);
  }
}

// The memory

/** Show a message that a search found; a drawer that covers it closes. */
function goTo(place) {
  byId("veil").click();
  chat.goTo(place);
}

/** Show the memory after a recall, unless another conversation was opened meanwhile. */
function recalled(id, found) {
  if (current.id === id && !running) memory.show(found);
}

// The layout

function say(text) {
  byId("status").textContent = text;
}

async function rename(title) {
  current.title = title.trim();
  if (current.messages.length) await keep(current);
  list();
}

function veil() {
  const { classList } = document.querySelector(".app");
  byId("veil").hidden = !classList.contains("show-side") && !classList.contains("show-memory");
}

function drawer(name, isOpen, focus) {
  document.querySelector(".app").classList.toggle(name, isOpen);
  veil();
  byId(focus).focus();
}

function applyTheme() {
  const isDark = settings.theme ? settings.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
}

function askForKey() {
  openSettings();
  byId("set-key").focus();
}

function openSettings() {
  byId("set-key").value = settings.key;
  byId("set-system").value = current.system;
  byId("set-temperature").value = current.temperature;
  byId("set-max").value = current.maxTokens;
  byId("set-theme").value = settings.theme;
  if (!byId("settings").open) byId("settings").showModal();
}

async function closeSettings() {
  if (byId("settings").returnValue !== "save") return;
  const own = { temperature: byId("set-temperature").value, maxTokens: byId("set-max").value };
  Object.assign(settings, { ...own, key: byId("set-key").value.trim(), theme: byId("set-theme").value });  // new conversations begin with these
  saveSettings(settings);
  api.key = settings.key;
  applyTheme();
  Object.assign(current, { ...own, system: byId("set-system").value.trim() });
  if (current.messages.length) await keep(current);
  await connect();
}

async function connect() {
  try {
    byId("model").textContent = model = await api.model();
    await look();
  } catch (error) {
    byId("model").textContent = "not connected";
    if (error.status === 401) askForKey();
    else chat.fail(error.message);
  }
}

function listen() {
  const wide = matchMedia("(min-width: 1121px)");
  byId("stop").addEventListener("click", () => { running?.stop(); composer.focus(); });
  byId("new").addEventListener("click", () => { open(fresh()); composer.focus(); });
  byId("title").addEventListener("change", () => rename(byId("title").value));
  byId("title").addEventListener("keydown", (event) => { if (event.key === "Enter") byId("title").blur(); });
  byId("export").addEventListener("click", () => download("am-memory.json", "application/json", exported(conversations)));
  byId("export-one").addEventListener("click", () => download("conversation.md", "text/markdown", asMarkdown(current.title, tree.path(current))));
  byId("import").addEventListener("click", () => byId("import-file").click());
  byId("import-file").addEventListener("change", importFile);
  byId("open-side").addEventListener("click", () => drawer("show-side", true, "close-side"));
  byId("close-side").addEventListener("click", () => drawer("show-side", false, "open-side"));
  byId("close-memory").addEventListener("click", () => drawer("show-memory", false, "toggle-memory"));
  byId("toggle-memory").addEventListener("click", () => {
    if (!wide.matches) { drawer("show-memory", true, "close-memory"); return; }
    const isHidden = document.querySelector(".app").classList.toggle("no-memory");
    byId("toggle-memory").setAttribute("aria-expanded", String(!isHidden));
  });
  byId("veil").addEventListener("click", () => { document.querySelector(".app").classList.remove("show-side", "show-memory"); veil(); });
  byId("open-settings").addEventListener("click", openSettings);
  byId("settings").addEventListener("close", closeSettings);
  byId("compact").addEventListener("click", async () => {
    memory.say("compacting", true);
    await api.compact(current.id).catch((error) => chat.fail(error.message));
    await look();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || byId("settings").open) return;
    if (document.querySelector(".app").matches(".show-side, .show-memory")) byId("veil").click();
    else running?.stop();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", applyTheme);
  addEventListener("pagehide", () => { if (running) store.put(current); });
  byId("starters").append(...STARTERS.map((text) => {
    const item = document.createElement("li"), button = document.createElement("button");
    button.textContent = text;
    button.addEventListener("click", () => send(text));
    item.append(button);
    return item;
  }));
}

api.key = settings.key;
applyTheme();
listen();
await open(conversations.find(({ id }) => id === settings.current) ?? conversations[0] ?? fresh());
await connect();
composer.focus();
