// One page, two halves: a conversation over the API that everybody uses, and what the engine does meanwhile.

const $ = (id) => document.getElementById(id);
const key = $("key");
const messages = [];
let model = null;
let hasChat = false;
let running = null;

key.value = sessionStorage.getItem("key") ?? "";
key.addEventListener("change", () => { sessionStorage.setItem("key", key.value); start(); });

const headers = () => ({ "Content-Type": "application/json", ...(key.value && { Authorization: `Bearer ${key.value}` }) });

async function start() {
  try {
    const answer = await fetch("v1/capabilities", { headers: headers() });
    if (answer.status === 401) {
      $("key-label").hidden = false;
      return say("a key is needed", true);
    }
    const told = await answer.json();
    model = told.model.id;
    hasChat = told.chat;
    $("model").textContent = model;
    $("input").placeholder = hasChat ? "Say something" : "Text to go on from: this model has no chat template";
  } catch (error) {
    say(`no answer: ${error.message}`, true);
  }
}

function say(text, isBad = false) {
  $("status").textContent = text;
  $("status").className = isBad ? "bad" : "";
}

// ---- the conversation

function show(role, text) {
  const box = document.createElement("div");
  box.className = `message ${role}`;
  box.textContent = text;
  $("messages").append(box);
  box.scrollIntoView({ block: "end" });
  return box;
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function send(text) {
  show("user", text);
  messages.push({ role: "user", content: text });
  const box = show("assistant", "");
  const options = {
    model, stream: true, stream_options: { include_usage: true },
    temperature: Number($("temperature").value), max_tokens: Number($("max-tokens").value),
  };
  const [path, body] = hasChat
    ? ["v1/chat/completions", { ...options, messages }]
    : ["v1/completions", { ...options, prompt: text }];
  running = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  const began = performance.now();
  let first = null;
  let said = "";
  try {
    const answer = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    for await (const event of events(answer.body)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      const piece = choice && (hasChat ? choice.delta.content : choice.text);
      if (piece) {
        first ??= performance.now();
        said += piece;
        box.append(piece);
        $("messages").scrollTop = $("messages").scrollHeight;
      }
      if (event.usage) {
        const { prompt_tokens, completion_tokens, prompt_tokens_details } = event.usage;
        const seconds = (performance.now() - first) / 1000;
        $("timing").textContent = `${prompt_tokens} prompt tokens, ${prompt_tokens_details.cached_tokens} from the cache · first token after `
          + `${Math.round(first - began)} ms · ${completion_tokens} tokens, ${((completion_tokens - 1) / seconds).toFixed(1)} per second`;
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      box.classList.add("error");
      box.append(error.message);
    }
  } finally {
    if (said) messages.push({ role: "assistant", content: said });
    else messages.pop();
    running = null;
    $("send").disabled = false;
    $("stop").disabled = true;
  }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("input").value.trim();
  if (!text || running || !model) return;
  $("input").value = "";
  send(text);
});
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => { running?.abort(); messages.length = 0; $("messages").replaceChildren(); $("timing").textContent = ""; });

// ---- the engine

const colour = (place) => `hsl(${(place * 137.5 + 260) % 360} 70% 55%)`;
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function canvas(id) {
  const element = $(id);
  const scale = devicePixelRatio || 1;
  const width = element.clientWidth;
  const height = element.clientHeight;
  if (element.width !== Math.round(width * scale)) element.width = Math.round(width * scale);
  const context = element.getContext("2d");
  context.setTransform(scale, 0, 0, element.height / height, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

function drawPages({ pages }) {
  const { context, width, height } = canvas("pages");
  let side = Math.floor(Math.sqrt((width * height) / pages.length)) || 1;
  while (side > 1 && Math.floor(width / side) * Math.floor(height / side) < pages.length) side--;
  const columns = Math.floor(width / side);
  pages.forEach((owner, at) => {
    context.fillStyle = owner === 0 ? css("--free") : owner === 1 ? css("--tree") : colour(owner - 2);
    context.fillRect((at % columns) * side, Math.floor(at / columns) * side, side - (side > 3 ? 1 : 0), side - (side > 3 ? 1 : 0));
  });
}

function drawTree({ tree }) {
  const { context, width, height } = canvas("tree");
  const nodes = tree.map((node) => ({ ...node, children: [], below: node.pages }));
  const roots = [];
  for (const node of nodes) (node.parent < 0 ? roots : nodes[node.parent].children).push(node);
  for (const node of [...nodes].reverse()) if (node.parent >= 0) nodes[node.parent].below += node.below;
  const depth = (list) => (list.length ? 1 + Math.max(...list.map((node) => depth(node.children))) : 0);
  const row = Math.min(22, height / Math.max(1, depth(roots)));
  const place = (list, left, room, level) => {
    const total = list.reduce((sum, node) => sum + node.below, 0);
    for (const node of list) {
      const wide = (room * node.below) / total;
      context.fillStyle = node.pins ? css("--pinned") : css("--tree");
      context.fillRect(left, level * row, Math.max(1, wide - 1), row - 1);
      place(node.children, left, wide, level + 1);
      left += wide;
    }
  };
  place(roots, 0, width, 0);
}

function drawTimeline({ timeline }) {
  const { context, width, height } = canvas("timeline");
  const bar = width / 120;
  const rates = timeline.map(({ steps, prefill_tokens, decode_tokens }) => [prefill_tokens / steps, decode_tokens / steps]);
  const most = Math.max(1, ...rates.map(([prefill, decode]) => prefill + decode));
  rates.forEach(([prefill, decode], at) => {
    const x = width - (rates.length - at) * bar;
    context.fillStyle = css("--decode");
    context.fillRect(x, height - (height * decode) / most, bar - 0.5, (height * decode) / most);
    context.fillStyle = css("--prefill");
    context.fillRect(x, height - (height * (decode + prefill)) / most, bar - 0.5, (height * prefill) / most);
  });
}

function listRequests({ requests }) {
  const rows = requests.slice(0, 32).map((request, place) => {
    const row = document.createElement("tr");
    for (const value of [null, request.state, request.prompt, request.cached, `${request.output} / ${request.max_tokens}`]) {
      const cell = row.insertCell();
      if (value === null) {
        cell.textContent = "■";
        cell.style.color = colour(place);
      } else cell.textContent = value;
    }
    return row;
  });
  $("requests").tBodies[0].replaceChildren(...rows);
}

async function look() {
  if (document.visibilityState === "visible" && model) {
    try {
      const answer = await fetch("engine/state", { headers: headers() });
      if (answer.ok) {
        const state = await answer.json();
        say("ready");
        $("counts").textContent = `${state.running} running, ${state.waiting} waiting, ${state.steps} steps`;
        if (state.pages) for (const draw of [drawPages, drawTree, drawTimeline, listRequests]) draw(state);
      } else say(`engine: ${answer.status}`, true);
    } catch {
      say("no answer", true);
    }
  }
  setTimeout(look, 250);
}

start().then(look);
