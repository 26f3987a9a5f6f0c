// The page: what is open, what runs, and what happens when something is pressed.

import * as api from "./api.js";
import * as store from "./store.js";
import { Answer, button, copyButton, element } from "./view.js";

const at = (id) => document.getElementById(id);
const THEME = "puna.theme";
const OPEN = "puna.open";

let offered = { models: [], rewards: [] };
let open = null;
const running = new Map(); // lane -> what stops it
const seen = new Map(); // id -> conversation: the one whose answers may still come, not a copy of it

// Conversations -------------------------------------------------------------------------------------------------------

function show(conversation) {
  open = seen.get(conversation.id) ?? conversation;
  seen.set(open.id, open);
  sessionStorage.setItem(OPEN, open.id);
  at("title").value = open.title;
  at("system").value = open.system;
  at("temperature").value = open.temperature;
  at("length").value = open.length ?? "";
  setMenu(false);
  notice("");
  draw();
  at("question").focus();
}

function keep() {
  open.changed = Date.now();
  if (open.lanes.some((lane) => lane.nodes.length) && !store.save(open)) {
    notice("The browser has no room left: export and delete old conversations.");
  }
}

function drawList() {
  const saved = store.all();
  at("list").replaceChildren(
    ...saved.map((conversation) => {
      const title = conversation.title || "Untitled";
      const here = conversation.id === open.id;
      const choose = button(title, () => show(conversation), { className: "title" });
      if (here) choose.setAttribute("aria-current", "true");
      const drop = button("×", () => remove(conversation), { className: "quiet", "aria-label": `Delete ${title}` });
      return element("li", {}, choose, drop);
    }),
  );
}

function remove(conversation) {
  if (!confirm(`Delete “${conversation.title || "Untitled"}”?`)) return;
  for (const lane of seen.get(conversation.id)?.lanes ?? []) running.get(lane)?.abort();
  seen.delete(conversation.id);
  store.remove(conversation);
  if (conversation.id === open.id) show(store.makeConversation(offered.models[0].name));
  else drawList();
}

function download(conversations, name) {
  const text = store.exported(conversations);
  if (!text) return notice("There is no answer to export yet.");
  const address = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  element("a", { href: address, download: `${name.replace(/[^\p{L}\p{N}]+/gu, "-") || "dialog"}.jsonl` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

// Turns ---------------------------------------------------------------------------------------------------------------

function draw() {
  drawList();
  at("compare").setAttribute("aria-pressed", open.lanes.length > 1);
  at("lanes").replaceChildren(...open.lanes.map(drawLane));
  drawButtons();
  for (const log of document.querySelectorAll(".turns")) log.scrollTop = log.scrollHeight;
}

function drawButtons() {
  const busy = open.lanes.some((lane) => running.has(lane));
  at("send").hidden = busy;
  at("stop").hidden = !busy;
}

function drawLane(lane, number) {
  const options = offered.models.map(({ name }) => element("option", { value: name, textContent: name }));
  if (!offered.models.some(({ name }) => name === lane.model)) {
    options.unshift(element("option", { value: lane.model, textContent: `${lane.model} (not served)` }));
  }
  const select = element("select", { "aria-label": `Model ${number + 1}` }, ...options);
  select.value = lane.model;
  select.onchange = () => {
    lane.model = select.value;
    keep();
  };
  const shown = store.path(lane);
  const turns = shown.length ? shown.map((i) => drawTurn(lane, i)) : [element("p", { className: "empty" }, GREETING)];
  const log = element("div", { className: "turns", role: "log", tabIndex: 0 }, ...turns);
  log.setAttribute("aria-label", `Conversation with model ${number + 1}`);
  return element("div", { className: "lane" }, element("div", { className: "model" }, select), log);
}

const GREETING = "Ask something. The answer comes from the model on this server, and nowhere else.";

function drawTurn(lane, number) {
  const node = lane.nodes[number];
  const isAnswer = node.role === "assistant";
  const turn = element("article", { className: node.role });
  turn.setAttribute("aria-label", isAnswer ? `Answer of ${node.model}` : "Your message");
  const tools = element("div", { className: "tools" }, ...branches(lane, number));
  if (isAnswer) {
    const place = new Answer();
    place.update(node.text);
    turn.append(place.element);
    live.set(node, { place, turn });
    tools.append(button("Regenerate", () => generate(lane, node.parent)), copyButton(() => node.text));
    turn.append(facts(node), tools);
  } else {
    tools.append(button("Edit", () => edit(lane, number, turn)), copyButton(() => node.text));
    turn.append(element("div", { className: "text" }, node.text), tools);
  }
  return turn;
}

const live = new WeakMap(); // an answer -> where it is drawn

function branches(lane, number) {
  const here = store.siblings(lane, number);
  if (here.length < 2) return [];
  const position = here.indexOf(number);
  const step = (by, sign, label) =>
    button(sign, () => choose(lane, here[position + by]), {
      "aria-label": label,
      disabled: here[position + by] === undefined,
    });
  const count = element("span", { className: "count" }, `${position + 1}/${here.length}`);
  return [step(-1, "‹", "Earlier version"), count, step(1, "›", "Later version")];
}

function choose(lane, number) {
  if (running.has(lane)) return;
  lane.chosen[lane.nodes[number].parent] = number;
  keep();
  draw();
}

/** Tokens, speed and scores of an answer; what went wrong, where something did. */
function facts(node) {
  const said = [];
  if (node.finish === "length") said.push("cut at the longest answer");
  if (node.finish === "stopped") said.push("stopped");
  if (node.tokens) said.push(`${node.tokens} tokens, ${node.rate.toFixed(1)} tokens/s`);
  for (const [name, score] of Object.entries(node.scores ?? {})) said.push(`${name} ${score.toFixed(2)}`);
  const line = element("p", { className: "facts" }, ...said.map((text) => element("span", {}, text)));
  if (node.finish && !node.text.trim() && !node.error) line.prepend(element("span", {}, "no answer"));
  if (node.error) line.append(element("span", { className: "error" }, node.error));
  return line;
}

function edit(lane, number, turn) {
  if (running.has(lane)) return;
  const node = lane.nodes[number];
  const field = element("textarea", { value: node.text, rows: 3, "aria-label": "Edit your message" });
  const save = () => {
    if (field.value.trim()) generate(lane, store.add(lane, node.parent, "user", field.value.trim()));
  };
  field.onkeydown = (event) => {
    event.stopPropagation();
    if (event.key === "Escape") draw();
    if (isSend(event)) save();
  };
  const tools = element("div", { className: "tools" }, button("Send edited", save), button("Cancel", draw));
  turn.replaceChildren(field, tools);
  field.focus();
}

// Answers -------------------------------------------------------------------------------------------------------------

/** A new answer below a question. */
async function generate(lane, question) {
  if (running.has(lane)) return;
  const conversation = open;
  const number = store.add(lane, question, "assistant", "");
  const node = Object.assign(lane.nodes[number], { model: lane.model });
  const stopper = new AbortController();
  running.set(lane, stopper);
  keep();
  draw();
  try {
    await receive(conversation, lane, question, node, stopper.signal);
  } catch (error) {
    if (error.name === "AbortError") node.finish = "stopped";
    else node.error = error.message;
  }
  running.delete(lane);
  await finish(conversation, lane, number);
}

async function receive(conversation, lane, question, node, signal) {
  const request = {
    model: lane.model,
    messages: store.messages(conversation, lane, question),
    temperature: conversation.temperature,
    top_p: 0.9,
    ...(conversation.length ? { max_tokens: conversation.length } : {}),
  };
  let saved = Date.now();
  const began = performance.now();
  for await (const { text, finish, tokens } of api.answer(request, signal)) {
    if (text) {
      node.text += text;
      follow(node);
    }
    if (finish) node.finish = finish;
    if (tokens) Object.assign(node, { tokens, rate: (1000 * tokens) / (performance.now() - began) });
    if (Date.now() - saved > 1000) {
      store.save(conversation);
      saved = Date.now();
    }
  }
}

/** Show an answer's text so far, and stay at its end where the reader is there. */
function follow(node) {
  const { place, turn } = live.get(node);
  const log = turn.parentElement;
  const atEnd = !log || log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  place.update(node.text);
  if (log && atEnd) log.scrollTop = log.scrollHeight;
}

async function finish(conversation, lane, number) {
  if (!seen.has(conversation.id)) return; // deleted meanwhile
  const node = lane.nodes[number];
  store.save(conversation);
  const drawFacts = () => {
    const { place, turn } = live.get(node);
    place.draw();
    turn.querySelector(".facts").replaceWith(facts(node));
    drawButtons();
  };
  drawFacts();
  if (!offered.rewards.length || !node.text.trim()) return;
  try {
    node.scores = await api.score(store.messages(conversation, lane, number));
    store.save(conversation);
    drawFacts();
  } catch (error) {
    notice(`No score: ${error.message}`);
  }
}

function send() {
  const text = at("question").value.trim();
  if (!text || open.lanes.some((lane) => running.has(lane))) return;
  at("question").value = "";
  fit();
  notice("");
  if (!open.title) at("title").value = open.title = text.replace(/\s+/g, " ").slice(0, 48);
  for (const lane of open.lanes) {
    generate(lane, store.add(lane, store.path(lane).at(-1) ?? store.ROOT, "user", text));
  }
}

function stop() {
  for (const lane of open.lanes) running.get(lane)?.abort();
}

/** A second lane, which goes on from the first one's turns; or the first one alone again. */
function compare() {
  if (open.lanes.some((lane) => running.has(lane))) return;
  if (open.lanes.length > 1) open.lanes.pop();
  else {
    const [first] = open.lanes;
    const other = offered.models.find(({ name }) => name !== first.model) ?? offered.models[0];
    open.lanes.push(store.makeLane(other.name, first));
  }
  keep();
  draw();
}

// The page ------------------------------------------------------------------------------------------------------------

function notice(text) {
  at("notice").textContent = text;
}

function isSend(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return false;
  event.preventDefault();
  return true;
}

/** The question's field is as high as its text, within reason. */
function fit() {
  at("question").rows = Math.min(at("question").value.split("\n").length, 8);
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  const dark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  at("theme").textContent = dark ? "Light" : "Dark";
  at("theme").onclick = () => {
    localStorage.setItem(THEME, dark ? "light" : "dark");
    setTheme(dark ? "light" : "dark");
  };
}

function setting(id, take) {
  at(id).onchange = () => {
    take(at(id).value);
    keep();
  };
}

/** The list of conversations on a narrow screen. */
function setMenu(isShown) {
  document.body.classList.toggle("menu", isShown);
  at("menu").setAttribute("aria-expanded", isShown);
}

function wire() {
  at("new").onclick = () => show(store.makeConversation(offered.models[0].name));
  at("export").onclick = () => download([open], open.title);
  at("export-all").onclick = () => download(store.all(), "conversations");
  at("compare").onclick = compare;
  at("send").onclick = send;
  at("stop").onclick = stop;
  at("question").oninput = fit;
  at("question").onkeydown = (event) => void (isSend(event) && send()); // false would forbid typing
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    setMenu(false);
    stop();
  });
  addEventListener("pagehide", () => running.size && keep());
  document.querySelector("main").onclick = (event) => setMenu(event.target === at("menu"));
  at("settings-button").onclick = () => {
    at("settings").hidden = !at("settings").hidden;
    at("settings-button").setAttribute("aria-expanded", !at("settings").hidden);
  };
  setting("title", (value) => {
    open.title = value.trim();
    store.save(open);
    drawList();
  });
  setting("system", (value) => (open.system = value));
  setting("temperature", (value) => (open.temperature = Math.min(Math.max(Number(value) || 0, 0), 2)));
  setting("length", (value) => (open.length = Math.max(Math.trunc(Number(value)), 0) || null));
}

/** The server's settings; asks for a key until it has a good one. */
async function connect() {
  for (;;) {
    try {
      return await api.settings();
    } catch (error) {
      if (error.status !== 401) throw error;
      await askForKey();
    }
  }
}

function askForKey() {
  const dialog = at("key-dialog");
  at("key-notice").textContent = at("key").value ? "The server does not know this key." : "";
  dialog.showModal();
  return new Promise((resolve) => {
    const go = () => {
      const strange = at("key").value.match(/[^\x20-\x7e\xa0-\xff]/u);
      if (strange) {
        const name = strange[0].codePointAt().toString(16).toUpperCase().padStart(4, "0");
        at("key-notice").textContent = `No key can hold the character U+${name}: copy it anew.`;
        return;
      }
      api.setKey(at("key").value);
      dialog.close();
      resolve();
    };
    dialog.oncancel = (event) => event.preventDefault();
    at("key-button").onclick = go;
    at("key").onkeydown = (event) => void (isSend(event) && go());
  });
}

async function start() {
  setTheme(localStorage.getItem(THEME));
  try {
    offered = await connect();
  } catch (error) {
    return notice(`${error.message} Load the page again once the server runs.`);
  }
  wire();
  const last = store.all().find(({ id }) => id === sessionStorage.getItem(OPEN));
  show(last ?? store.makeConversation(offered.models[0].name));
}

start();
