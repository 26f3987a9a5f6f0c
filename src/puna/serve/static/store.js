// Conversations, kept in the browser. A conversation has a lane for each model that answers in it; a lane is a tree of
// turns, in which `chosen` says which child of a turn is shown. Edited questions and new answers are new children.

const PREFIX = "puna.conversation.";
export const ROOT = -1;

/** A lane of its own for a model; with another lane's turns, where the two shall go on from the same ones. */
export function makeLane(model, like) {
  return { ...(like ? structuredClone(like) : { nodes: [], chosen: {} }), model };
}

export function makeConversation(model) {
  return {
    id: Array.from(crypto.getRandomValues(new Uint32Array(4)), (n) => n.toString(36)).join(""),
    title: "",
    system: "",
    temperature: 0.6,
    length: null,
    lanes: [makeLane(model)],
    changed: Date.now(),
  };
}

/** Every conversation, the newest first. What is damaged is left alone and not shown. */
export function all() {
  const found = [];
  for (const key of Object.keys(localStorage).filter((name) => name.startsWith(PREFIX))) {
    try {
      const conversation = JSON.parse(localStorage.getItem(key));
      if (Array.isArray(conversation.lanes)) found.push(conversation);
    } catch {
      continue;
    }
  }
  return found.sort((a, b) => b.changed - a.changed);
}

/** Keep a conversation. False where the browser has no room left. */
export function save(conversation) {
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    return true;
  } catch {
    return false;
  }
}

export function remove(conversation) {
  localStorage.removeItem(PREFIX + conversation.id);
}

/** A new turn below another, and the one that is shown there from now on; its number. */
export function add(lane, parent, role, text) {
  lane.nodes.push({ parent, role, text });
  lane.chosen[parent] = lane.nodes.length - 1;
  return lane.nodes.length - 1;
}

/** The numbers of the turns that are shown, from the first. */
export function path(lane) {
  const shown = [];
  for (let at = lane.chosen[ROOT]; at !== undefined; at = lane.chosen[at]) shown.push(at);
  return shown;
}

/** The turns that stand in one place, this one among them. */
export function siblings(lane, number) {
  const { parent } = lane.nodes[number];
  return lane.nodes.flatMap((node, i) => (node.parent === parent ? [i] : []));
}

/** The dialog up to a turn, as the API takes it. A question whose answer has no text is left out, with its answer. */
export function messages(conversation, lane, last) {
  const turns = [];
  for (let at = last; at !== ROOT; at = lane.nodes[at].parent) turns.unshift(lane.nodes[at]);
  const said = [];
  for (let i = 0; i < turns.length; i += 2) {
    const [question, answer] = turns.slice(i, i + 2);
    if (answer && !answer.text.trim()) continue;
    said.push({ role: "user", content: question.text });
    if (answer) said.push({ role: "assistant", content: answer.text.trim() });
  }
  const system = conversation.system.trim();
  return system ? [{ role: "system", content: system }, ...said] : said;
}

/** The dialogs that are shown, a line each, as `puna sft` takes them. */
export function exported(conversations) {
  const lines = conversations.flatMap((conversation) =>
    conversation.lanes.flatMap((lane) => {
      const answers = path(lane).filter((i) => lane.nodes[i].role === "assistant" && lane.nodes[i].text.trim());
      if (!answers.length) return [];
      const last = answers.at(-1);
      return [{ messages: messages(conversation, lane, last), model: lane.model, ...lane.nodes[last].scores }];
    }),
  );
  return lines.map((line) => `${JSON.stringify(line)}\n`).join("");
}
