// What the page asks of its server. Nothing else is ever contacted.

const KEY = "puna.key";

export class Refusal extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** The key of this tab, gone when it closes. */
export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

async function ask(path, body, signal) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, {
    method: body ? "POST" : "GET",
    headers,
    body: body && JSON.stringify(body),
    signal,
  }).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server cannot be reached.", 0);
  });
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  throw new Refusal(said?.error?.message ?? `The server answered ${response.status}.`, response.status);
}

/** The models, by name and context, and the reward models. */
export async function settings() {
  return (await ask("/chat/settings")).json();
}

/** A text's elements, as nested arrays. */
export async function markdown(text) {
  return (await (await ask("/chat/markdown", { text })).json()).nodes;
}

/** The reward models' scores of a dialog that ends with an answer. */
export async function score(messages) {
  return (await (await ask("/v1/score", { messages })).json()).scores;
}

/** An answer in pieces: {text} as it comes, at the end {tokens}. */
export async function* answer(request, signal) {
  const body = { ...request, stream: true, stream_options: { include_usage: true } };
  const response = await ask("/v1/chat/completions", body, signal);
  for await (const event of events(response.body)) {
    if (event.error) throw new Refusal(event.error.message, 500);
    const text = event.choices[0]?.delta.content;
    if (text) yield { text };
    if (event.choices[0]?.finish_reason) yield { finish: event.choices[0].finish_reason };
    if (event.usage) yield { tokens: event.usage.completion_tokens };
  }
}

/** The JSON of server-sent events, up to [DONE]. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Refusal("The server hung up before the answer ended.", 0);
    const whole = (waiting + value).split("\n\n");
    waiting = whole.pop();
    for (const event of whole) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
