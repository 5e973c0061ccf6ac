"use strict";
// The token is in the address's fragment, which is never sent to a server or written to its log.
const token = location.hash.slice(1);
const get = (id) => document.getElementById(id);
let sheet = null;
let at = 0; // the row that is shown
let last = Promise.resolve(); // what is being written: one after another, in the order of the keys
let marked = 0; // which of its ratings is marked: place = answer * criteria + criterion

async function ask(path, body) {
  const options = { headers: { "X-Lorafleet-Token": token } };
  if (body !== undefined) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer: start `lorafleet rate` again. Your earlier ratings are saved.");
  }
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error || `The server refused the request (${answer.status}).`);
  return value;
}

function say(error) {
  get("error").textContent = error ? error.message : "";
  get("error").hidden = !error;
}

const key = (item, slot, criterion) => `${item.row}/${slot}/${criterion}`;
const places = () => sheet.items[at].answers.length * sheet.criteria.length;
const wanted = () => sheet.items.reduce((sum, item) => sum + item.answers.length * sheet.criteria.length, 0);

function place(index) {
  const answer = sheet.items[at].answers[Math.floor(index / sheet.criteria.length)];
  return { slot: answer.slot, criterion: sheet.criteria[index % sheet.criteria.length] };
}

function firstMissing(item) {
  let index = 0;
  for (const answer of item.answers) {
    for (const criterion of sheet.criteria) {
      if (sheet.scores[key(item, answer.slot, criterion)] === undefined) return index;
      index += 1;
    }
  }
  return -1;
}

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  return made;
}

function draw() {
  const item = sheet.items[at];
  const rated = Object.keys(sheet.scores).length;
  get("title").textContent = sheet.title;
  get("progress").textContent = `row ${at + 1} of ${sheet.items.length}, ${rated} of ${wanted()} rated`;
  get("number").textContent = `held-out row ${item.row}`;
  get("prompt").replaceChildren(...drawnPrompt(item));
  get("reference").textContent = item.reference;
  get("note").value = sheet.notes[item.row] || "";
  const answers = get("answers");
  answers.replaceChildren();
  let index = 0;
  for (const answer of item.answers) {
    const box = element("article");
    box.append(element("h3", `answer ${answer.slot}`), element("p", answer.text || "(nothing)"));
    for (const criterion of sheet.criteria) {
      const group = element("fieldset", undefined, { "data-place": index });
      if (index === marked) group.className = "marked";
      group.append(element("legend", criterion));
      for (let score = sheet.lowest; score <= sheet.highest; score += 1) {
        const button = element("button", score, {
          "aria-pressed": sheet.scores[key(item, answer.slot, criterion)] === score,
          "aria-label": `answer ${answer.slot}, ${criterion}: ${score}`,
          "data-rate": `${answer.slot}/${criterion}/${score}`,
        });
        const here = index;
        button.addEventListener("click", () => rate(here, score));
        group.append(button);
      }
      box.append(group);
      index += 1;
    }
    answers.append(box);
  }
  get("row").hidden = false;
  const ended = rated >= wanted();
  if (ended) queueMicrotask(() => last.then(drawMeans)); // after what is being written
  get("done").hidden = !ended;
}

// A conversation names who speaks; a text alone is shown as it is.
function drawnPrompt(item) {
  if (!item.turns.length) return [item.prompt];
  return item.turns.map((turn) => {
    const box = element("div", undefined, { class: "turn" });
    box.append(element("b", turn.role), turn.text);
    return box;
  });
}

// Which answers were whose is told when nothing can be rated by it any more.
async function drawMeans() {
  try {
    const { means } = await ask("/api/means");
    const rows = means.map((one) => [one.arm, ...sheet.criteria.map((name) => one.means[name].toFixed(2))]);
    const lines = [["mean of your ratings", ...sheet.criteria], ...rows].map((cells, index) => {
      const line = element("tr");
      line.append(...cells.map((cell) => element(index ? "td" : "th", cell)));
      return line;
    });
    get("means").replaceChildren(...(means.length ? lines : []));
  } catch (error) {
    say(error);
  }
}

async function rate(index, score) {
  const item = sheet.items[at];
  const { slot, criterion } = place(index);
  const name = key(item, slot, criterion);
  const before = sheet.scores[name];
  sheet.scores[name] = score; // shown, and the next one marked, at once: keys come faster than a disk writes
  marked = Math.min(index + 1, places() - 1);
  if (firstMissing(item) < 0 && at + 1 < sheet.items.length && index === places() - 1) go(at + 1);
  else draw();
  last = last.then(async () => {
    try {
      await ask("/api/rate", { row: item.row, slot, criterion, score });
      say(null);
    } catch (error) {
      if (before === undefined) delete sheet.scores[name];
      else sheet.scores[name] = before;
      at = sheet.items.indexOf(item);
      marked = index;
      draw();
      say(error);
    }
  });
  await last;
}

function go(to) {
  at = Math.max(0, Math.min(to, sheet.items.length - 1));
  marked = Math.max(0, firstMissing(sheet.items[at]));
  get("hint").open = false;
  draw();
}

async function undo() {
  await last;
  try {
    sheet = await ask("/api/undo", {});
    say(null);
    if (sheet.undone) {
      const [row, slot, criterion] = sheet.undone;
      at = sheet.items.findIndex((item) => item.row === row);
      const answer = sheet.items[at].answers.findIndex((one) => one.slot === slot);
      marked = answer * sheet.criteria.length + sheet.criteria.indexOf(criterion);
    }
    draw();
  } catch (error) {
    say(error);
  }
}

get("previous").addEventListener("click", () => go(at - 1));
get("next").addEventListener("click", () => go(at + 1));
get("undo").addEventListener("click", undo);
get("note").addEventListener("change", async () => {
  const item = sheet.items[at];
  const text = get("note").value;
  sheet.notes[item.row] = text; // at once: a click elsewhere draws the page anew before the server answers
  try {
    await ask("/api/note", { row: item.row, text });
    say(null);
  } catch (error) {
    say(error);
  }
});
document.addEventListener("keydown", (event) => {
  if (!sheet || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target === get("note")) {
    if (event.key === "Escape" || event.key === "Enter") get("note").blur();
    return;
  }
  const score = Number(event.key);
  if (event.key.length === 1 && event.key >= String(sheet.lowest) && event.key <= String(sheet.highest)) rate(marked, score);
  else if (event.key === "ArrowRight") go(at + 1);
  else if (event.key === "ArrowLeft") go(at - 1);
  else if (event.key === "ArrowDown") { marked = Math.min(marked + 1, places() - 1); draw(); }
  else if (event.key === "ArrowUp") { marked = Math.max(marked - 1, 0); draw(); }
  else if (event.key === "u") undo();
  else if (event.key === "n") get("note").focus();
  else return;
  event.preventDefault();
});

(async () => {
  try {
    sheet = await ask("/api/sheet");
    const open = sheet.items.findIndex((item) => firstMissing(item) >= 0);
    go(open < 0 ? 0 : open);
  } catch (error) {
    say(error);
  }
})();
