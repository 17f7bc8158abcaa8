// The scrubber's view. The kernel (widgets.py) owns the segments and every edit; this draws them, plays frames, and
// turns keys and the mouse into commands. To the kernel go {do: command, ...}, never a trait: their echoes would arrive
// late and move the playhead back. From it come changed traits, {go: frame}, and frames: {episode, frame, error} with
// one JPEG a camera.

const AHEAD = 4; // frames to fetch in the direction of the last move, so that the next one is there already
const AHEAD_PLAYING = 12;
const IN_FLIGHT = 3; // frames asked for at a time: a jump never waits for more than these
const KEPT = 240; // frames kept as JPEGs
const ZOOMED = 90; // frames on the timeline when it is zoomed: wide enough to take hold of one
const OPEN = ["edited", "unfit", "outdated"]; // states of episodes that wait for a look
const NEAR = 6; // pixels beside a boundary in which the mouse takes hold of it

const HELP = [
  ["← →", "one frame back, on (with Shift: 10)"],
  ["Home End", "first, last frame"],
  ["Space", "play, pause"],
  ["[ ]", "select the boundary before, after"],
  [", .", "move the selected boundary by a frame (with Shift: 10)"],
  ["s", "split: a new segment begins at this frame"],
  ["x", "delete the selected boundary: two segments become one"],
  ["1 … 9", "name the segment at this frame"],
  ["h", "edit the other row"],
  ["u", "undo"],
  ["z", "zoom the timeline"],
  ["n p", "next, previous episode"],
];
const HELP_VERIFY = [["a", "accept the annotation as it is"], ["f", "save the segments as a fix"], ["r", "reject the episode"]];
const HELP_MARK = [["f", "save the mark"]];

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function render({ model, el }) {
  const get = (name) => model.get(name);
  const command = (name, content = {}) => model.send({ do: name, ...content });
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const marking = get("mode") === "mark";
  const heads = Object.keys(get("vocabulary"));

  // --- the page -----------------------------------------------------------------------------------------------------

  const button = (text, title, onclick) => make("button", { type: "button", textContent: text, title, onclick });
  const picker = make("select", { className: "picker", title: "episode, the most suspicious first" });
  picker.append(...get("picker").map(([episode]) => make("option", { value: episode })));
  picker.onchange = () => turnTo(Number(picker.value));
  const reason = make("span", { className: "reason" });
  const progress = make("span", { className: "quiet" });
  const pictures = get("cameras").map(() => make("canvas"));
  const cameras = make("div", { className: "cameras" });
  get("cameras").forEach((name, i) => cameras.append(make("figure", {}, pictures[i], make("figcaption", {}, name))));
  const player = button("▶", "play, pause (Space)", () => play());
  const time = make("span", { className: "time" });
  const slider = make("input", { type: "range", min: 0, step: 1, title: "frame" });
  slider.oninput = () => go(Number(slider.value));
  const bars = Object.fromEntries(heads.map((head) => [head, make("div", { className: "bar" })]));
  const label = (text) => make("span", { className: "label" }, text);
  const names = make("div", { className: "row names" });
  const zoomer = button("zoom", "zoom the timeline (z)", () => zoom());
  const tracks = make("div", { className: "tracks" }, label("frame"), slider);
  for (const head of heads) tracks.append(label(head), bars[head]);
  tracks.append(label("name it"), names);
  const why = make("input", { type: "text", className: "why", placeholder: "why (optional)" });
  const decide = (name) => command(name, { why: why.value });
  const verdicts = marking
    ? [button("save mark", "write the segments into the file (f)", () => decide("fix"))]
    : [
        button("accept", "the annotation is right as it is (a)", () => decide("accept")),
        button("save fix", "write the segments into the file (f)", () => decide("fix")),
        button("reject", "take the episode out of training (r)", () => decide("reject")),
      ];
  const message = make("div", { className: "message" });
  const help = make("details", {}, make("summary", {}, "keys (click the widget first)"), make("dl"));
  for (const [key, text] of [...HELP, ...(marking ? HELP_MARK : HELP_VERIFY)])
    help.lastChild.append(make("div", {}, make("dt", {}, key), make("dd", {}, text)));
  const root = make(
    "div",
    { className: "sarm-scrubber", tabIndex: 0 },
    make("div", { className: "row" }, button("‹", "previous episode (p)", () => turn(-1)), picker,
      button("›", "next episode (n)", () => turn(1)), progress, reason),
    cameras,
    make("div", { className: "row" }, player, button("−1", "one frame back (←)", () => go(frame - 1)),
      button("+1", "one frame on (→)", () => go(frame + 1)), time, zoomer),
    tracks,
    make("div", { className: "row" },
      button("split", "a new segment begins at this frame (s)", () => command("split", { frame })),
      button("delete boundary", "the selected one (x)", () => command("merge")),
      button("undo", "take back the last edit (u)", () => command("undo")), why, ...verdicts,
      button("withdraw", "take what was said about this episode out of the file", () => command("withdraw"))),
    message,
    help,
  );
  el.append(root);

  // --- frames: fetched when they are looked at ----------------------------------------------------------------------

  let episode = null, frame = 0, direction = 1, playing = false;
  const kept = new Map(); // frame: JPEGs or an error, of this episode
  const asked = new Map(); // frame: is it for showing, or ahead of that
  let turnOfPaint = 0, painted = 0, rested = 0, unreadable = "";

  function fetchFrames() {
    const ahead = playing ? AHEAD_PLAYING : AHEAD;
    for (let i = 0; i <= ahead && asked.size < IN_FLIGHT; i++) {
      const next = frame + i * direction;
      if (next < 0 || next >= get("length") || kept.has(next) || asked.has(next)) continue;
      asked.set(next, i === 0);
      command("send_frame", { episode, frame: next });
    }
    if (!asked.size && !playing && rested !== frame) command("rest", { episode, frame: (rested = frame) });
  }

  function receive(content, buffers) {
    if ("go" in content) return go(content.go);
    if (content.episode !== episode) return;
    const toShow = asked.get(content.frame);
    asked.delete(content.frame);
    kept.set(content.frame, { error: content.error, images: buffers.map((b) => new Blob([b], { type: "image/jpeg" })) });
    if (kept.size > KEPT) kept.delete(kept.keys().next().value);
    if (content.frame === frame || (toShow && !kept.has(frame))) paint(content.frame);
    fetchFrames();
  }

  async function paint(shown) {
    const mine = ++turnOfPaint, of = episode, { error, images } = kept.get(shown);
    const decoded = await Promise.all(images.map((image) => createImageBitmap(image)));
    if (mine < painted || of !== episode) return; // a later one was faster
    painted = mine;
    pictures.forEach((canvas, i) => {
      const { width, height } = decoded[i] ?? canvas;
      if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
      // So high that the timeline is in sight with them, in a small window too.
      const high = `max(110px, min(${Math.max(height, 300)}px, 46vh, 100vh - 350px))`;
      canvas.parentNode.style.maxWidth = `calc(${high} * ${width / height})`;
      if (decoded[i]) canvas.getContext("2d").drawImage(decoded[i], 0, 0);
      else canvas.getContext("2d").clearRect(0, 0, width, height);
    });
    unreadable = error;
    say();
    root.dataset.shown = `${of}:${shown}`;
  }

  function go(wanted) {
    const next = clamp(wanted, 0, get("length") - 1);
    if (next !== frame) direction = next > frame ? 1 : -1;
    frame = next;
    if (kept.has(frame)) paint(frame);
    fetchFrames();
    drawPlayhead();
  }

  function play(on = !playing) {
    playing = on;
    player.textContent = playing ? "❚❚" : "▶";
    if (!playing) return fetchFrames();
    if (frame === get("length") - 1) go(0);
    const period = 1000 / get("fps");
    let last = performance.now();
    const tick = (now) => {
      if (!playing || !root.isConnected) return;
      let next = frame;
      while (now - last >= period && kept.has(next + 1)) {
        next += 1; // never past what has arrived: it plays slower rather than skipping
        last += period;
      }
      if (now - last > period) last = now - period;
      if (next !== frame) go(next);
      if (frame === get("length") - 1) play(false);
      else requestAnimationFrame(tick);
    };
    direction = 1;
    fetchFrames();
    requestAnimationFrame(tick);
  }

  // --- the timeline -------------------------------------------------------------------------------------------------

  let span = [0, 1]; // frames on the timeline, from and to
  let zoomed = false, drag = null;
  const place = (at) => (100 * (at - span[0])) / (span[1] - span[0]);

  function zoom() {
    zoomed = !zoomed;
    zoomer.classList.toggle("on", zoomed);
    span = [0, get("length")];
    drawPlayhead();
    draw();
  }

  function drawPlayhead() {
    const length = get("length"), wide = Math.min(ZOOMED, length);
    if (zoomed && !drag && (span[1] - span[0] !== wide || frame < span[0] + wide / 8 || frame > span[1] - wide / 8)) {
      const from = clamp(Math.round(frame - wide / 2), 0, length - wide);
      if (from !== span[0] || from + wide !== span[1]) {
        span = [from, from + wide];
        draw();
      }
    }
    slider.value = frame;
    for (const head of heads) bars[head].lastChild.style.left = `${place(frame + 0.5)}%`;
    const here = heads.map((head) => get("segments")[head].find(([, start, end]) => start <= frame && frame <= end));
    const said = here.map((segment) => (segment ? segment[0] : "—")).join(" / ");
    time.textContent = `${frame} of ${length - 1} · ${(frame / get("fps")).toFixed(2)} s · ${said}`;
  }

  function drawBar(head, preview) {
    const bar = bars[head], active = head === get("head");
    const segments = get("segments")[head].map((segment) => [...segment]);
    const edges = get("boundaries")[head].map((boundary) => [...boundary]);
    if (preview) {
      const edge = edges[preview.index];
      edge[0] = preview.at;
      if (edge[3] !== null) segments[edge[3]][2] = preview.at - 1;
      if (edge[4] !== null) segments[edge[4]][1] = preview.at;
    }
    bar.classList.toggle("active", active);
    bar.replaceChildren();
    for (const [name, start, end] of segments) {
      const colour = colourOf(head, name), seconds = ((end - start + 1) / get("fps")).toFixed(2);
      const box = make("div", { className: "segment", title: `${name}: frames ${start} to ${end} (${seconds} s)` }, name);
      Object.assign(box.style, { left: `${place(start)}%`, width: `${place(end + 1) - place(start)}%` });
      Object.assign(box.style, { background: colour, color: readableOn(colour) });
      bar.append(box);
    }
    edges.forEach(([at, , , , , confidence], i) => {
      const line = make("div", { className: "boundary" });
      line.classList.toggle("selected", active && (preview ? preview.index : get("selected")) === i);
      line.classList.toggle("doubtful", confidence !== null && confidence < 0.5);
      line.style.left = `${place(at)}%`;
      bar.append(line);
    });
    bar.append(make("div", { className: "playhead" }));
  }

  const colourOf = (head, name) => {
    const i = get("vocabulary")[head].indexOf(name);
    return i < 0 ? "#999999" : get("colours")[i % get("colours").length];
  };

  function readableOn(colour) {
    const [r, g, b] = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
    return 0.299 * r + 0.587 * g + 0.114 * b > 125 ? "#111" : "#fff";
  }

  // The mouse on a bar: near a boundary it moves that, elsewhere it moves the playhead.
  for (const head of heads) {
    const bar = bars[head];
    const frameAt = (event) => {
      const box = bar.getBoundingClientRect();
      return span[0] + ((event.clientX - box.left) / box.width) * (span[1] - span[0]);
    };
    const boundaryAt = (event) => {
      const pixel = (span[1] - span[0]) / bar.getBoundingClientRect().width, here = frameAt(event);
      const distances = get("boundaries")[head].map(([at]) => Math.abs(at - here) / pixel);
      const nearest = distances.indexOf(Math.min(...distances));
      return distances[nearest] <= NEAR ? nearest : -1;
    };
    const follow = (event) => {
      if (drag.index < 0) return go(Math.floor(frameAt(event)));
      const [, low, high] = get("boundaries")[head][drag.index];
      drag.at = clamp(Math.round(frameAt(event)), low, high);
      drawBar(head, drag);
      go(drag.at);
    };
    bar.onpointerdown = (event) => {
      if (event.button !== 0) return;
      drag = { index: boundaryAt(event), at: null };
      bar.setPointerCapture(event.pointerId);
      if (head !== get("head")) command("activate", { head });
      if (drag.index < 0) follow(event);
      else drag.at = get("boundaries")[head][drag.index][0];
    };
    bar.onpointermove = (event) => {
      if (drag) follow(event);
      else bar.style.cursor = boundaryAt(event) < 0 ? "pointer" : "col-resize";
    };
    bar.onpointerup = bar.onpointercancel = () => {
      if (drag && drag.index >= 0) command("move", { head, boundary: drag.index, at: drag.at });
      drag = null;
    };
  }

  // --- drawing what the kernel says ---------------------------------------------------------------------------------

  function say() {
    const wrong = get("error") || unreadable;
    message.textContent = wrong || get("status");
    message.classList.toggle("error", Boolean(wrong));
  }

  function draw() {
    if (get("error") || get("episode") === turningTo) turningTo = null;
    if (episode !== get("episode")) {
      [episode, frame, rested, direction] = [get("episode"), get("frame"), get("frame"), 1];
      kept.clear();
      asked.clear();
      play(false);
      span = [0, get("length")];
      slider.max = get("length") - 1;
      why.value = get("why");
    }
    const states = get("states"), rows = get("picker"), index = rows.findIndex(([i]) => i === episode);
    rows.forEach(([i], row) => {
      const text = states[i] ? `episode ${i} · ${states[i]}` : `episode ${i}`;
      if (picker.options[row].textContent !== text) picker.options[row].textContent = text;
    });
    picker.selectedIndex = index;
    reason.textContent = index < 0 ? "" : rows[index][1];
    const done = rows.filter(([i]) => states[i] && !OPEN.includes(states[i].split(", ")[0])).length;
    const drafts = rows.filter(([i]) => states[i]?.endsWith("edited")).length;
    const unsaved = drafts ? `, ${drafts} edited and not saved` : "";
    progress.textContent = `${index + 1} of ${rows.length}, ${done} done${unsaved}`;
    if (!drag) heads.forEach((head) => drawBar(head));
    const head = get("head");
    names.replaceChildren();
    get("vocabulary")[head].forEach((name, i) => {
      const chip = button(i < 9 ? `${i + 1} ${name}` : name, "name the segment at this frame", () =>
        command("rename", { frame, number: i + 1 }));
      chip.style.borderLeftColor = colourOf(head, name);
      names.append(chip);
    });
    say();
    Object.assign(root.dataset, { episode, state: states[episode] ?? "" });
    drawPlayhead();
    fetchFrames();
  }

  let turningTo = null; // the episode that was asked for, until the kernel shows it

  function turnTo(wanted) {
    command("show_episode", { episode: (turningTo = wanted) });
  }

  function turn(step) {
    const rows = get("picker"), next = rows[rows.findIndex(([i]) => i === (turningTo ?? episode)) + step];
    if (next) turnTo(next[0]);
  }

  // --- keys ---------------------------------------------------------------------------------------------------------

  const far = (event) => (event.shiftKey ? 10 : 1);
  const keys = {
    ArrowLeft: (event) => go(frame - far(event)),
    ArrowRight: (event) => go(frame + far(event)),
    Home: () => go(0),
    End: () => go(get("length") - 1),
    " ": () => play(),
    "[": () => command("select", { step: -1, frame }),
    "]": () => command("select", { step: 1, frame }),
    ",": () => command("nudge", { by: -1 }),
    ".": () => command("nudge", { by: 1 }),
    "<": () => command("nudge", { by: -10 }),
    ">": () => command("nudge", { by: 10 }),
    s: () => command("split", { frame }),
    x: () => command("merge"),
    h: () => command("activate", { head: heads[(heads.indexOf(get("head")) + 1) % heads.length] }),
    u: () => command("undo"),
    z: () => zoom(),
    n: () => turn(1),
    p: () => turn(-1),
    f: () => decide("fix"),
    ...(marking ? {} : { a: () => decide("accept"), r: () => decide("reject") }),
  };

  // In JupyterLab's command mode a, d or x edit the notebook's cells. Its newer versions see keys after this widget, which
  // stops them below; older ones see them before, and heed this attribute. With Ctrl held it is off, so that saving the
  // notebook still works.
  const guard = (event) => root.toggleAttribute("data-lm-suppress-shortcuts", !(event.ctrlKey || event.metaKey));
  guard({});
  root.addEventListener("focusin", guard);
  root.addEventListener("keyup", guard);
  root.addEventListener("keydown", (event) => {
    guard(event);
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    event.stopPropagation();
    if (event.target === why || event.target === picker) {
      if (["Escape", "Enter"].includes(event.key)) root.focus();
      return;
    }
    const act = /^[1-9]$/.test(event.key) ? () => command("rename", { frame, number: Number(event.key) }) : keys[event.key];
    if (!act) return;
    event.preventDefault();
    act(event);
  });
  root.addEventListener("click", (event) => {
    if (!event.target.closest("input, select, summary")) root.focus({ preventScroll: true });
  });
  picker.addEventListener("change", () => root.focus({ preventScroll: true }));

  // --- life ---------------------------------------------------------------------------------------------------------

  const traits = ["episode", "segments", "boundaries", "selected", "head", "states", "status", "error"];
  const signed = () => (why.value = get("why"));
  traits.forEach((trait) => model.on(`change:${trait}`, draw));
  model.on("change:why", signed);
  model.on("msg:custom", receive);
  draw();
  return () => {
    play(false);
    traits.forEach((trait) => model.off(`change:${trait}`, draw));
    model.off("change:why", signed);
    model.off("msg:custom", receive);
  };
}

export default { render };
