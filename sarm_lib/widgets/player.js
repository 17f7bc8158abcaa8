// What the views of the scrubber and of the explorer share: this file stands before theirs, in one module. A view asks the
// kernel (player.py) with {do: command, ...} and never sets a trait: their echoes would arrive late and move the playhead
// back. From the kernel come changed traits, {go: frame}, and frames: {episode, frame, error} with one JPEG a camera.

const AHEAD = 4; // frames to fetch in the direction of the last move, so that the next one is there already
const AHEAD_PLAYING = 12;
const IN_FLIGHT = 3; // frames asked for at a time: a jump never waits for more than these
const KEPT = 240; // frames kept as JPEGs
const SHIFTED = { Comma: "<", Period: ">" }; // what a US keyboard has there
const ZOOMED = 90; // frames on the timeline when it is zoomed: wide enough to see each, and to take hold of it

const HELP = [
  ["← →", "one frame back, on (with Shift: 10)"],
  ["Home End", "first, last frame"],
  ["Space", "play, pause"],
  ["z", "zoom the timeline"],
  ["n p", "next, previous episode"],
];

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

const button = (text, title, onclick) => make("button", { type: "button", textContent: text, title, onclick });
const label = (text) => make("span", { className: "label" }, text);

// --- the frames of one episode, fetched when they are looked at -----------------------------------------------------
// `ask(episode, frame)` requests a frame, whose answer goes to `receive`; `moved(frame)`, `shown(frame, error)`,
// `rested(frame)` and `playing(on)` tell the page; `pictures` are the cameras' canvases.

function framePlayer({ pictures, fps, alive, ask, moved, shown, rested, playing }) {
  let episode = null, length = 1, frame = 0, direction = 1, plays = false;
  let turnOfPaint = 0, painted = 0, lastRest = 0;
  const kept = new Map(); // frame: JPEGs or an error, of this episode
  const asked = new Map(); // frame: is it for showing, or ahead of that

  function show(newEpisode, newLength, newFrame) {
    [episode, length, frame, lastRest, direction] = [newEpisode, newLength, newFrame, newFrame, 1];
    kept.clear();
    asked.clear();
    play(false);
  }

  function fetchFrames() {
    const ahead = plays ? AHEAD_PLAYING : AHEAD;
    for (let i = 0; i <= ahead && asked.size < IN_FLIGHT; i++) {
      const next = frame + i * direction;
      if (next < 0 || next >= length || kept.has(next) || asked.has(next)) continue;
      asked.set(next, i === 0);
      ask(episode, next);
    }
    if (!asked.size && !plays && lastRest !== frame) rested((lastRest = frame));
  }

  function receive(content, buffers) {
    if (content.episode !== episode) return;
    const toShow = asked.get(content.frame);
    asked.delete(content.frame);
    const images = buffers.map((bytes) => new Blob([bytes], { type: "image/jpeg" }));
    kept.set(content.frame, { error: content.error, images });
    if (kept.size > KEPT) kept.delete(kept.keys().next().value);
    if (content.frame === frame || (toShow && !kept.has(frame))) paint(content.frame);
    fetchFrames();
  }

  async function paint(wanted) {
    const mine = ++turnOfPaint, of = episode, { error, images } = kept.get(wanted);
    const decoded = await Promise.all(images.map((image) => image.size ? createImageBitmap(image) : null));
    if (mine < painted || of !== episode) return; // a later one was faster
    painted = mine;
    pictures.forEach((canvas, i) => {
      const { width, height } = decoded[i] ?? canvas;
      if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
      canvas.parentNode.style.setProperty("--ratio", width / height);
      canvas.parentNode.style.setProperty("--pixels", `${height}px`);
      if (decoded[i]) canvas.getContext("2d").drawImage(decoded[i], 0, 0);
      else canvas.getContext("2d").clearRect(0, 0, width, height);
    });
    shown(wanted, error);
  }

  function go(wanted) {
    const next = clamp(wanted, 0, length - 1);
    if (next !== frame) direction = next > frame ? 1 : -1;
    frame = next;
    if (kept.has(frame)) paint(frame);
    fetchFrames();
    moved(frame);
  }

  function play(on = !plays) {
    plays = on;
    playing(plays);
    if (!plays) return fetchFrames();
    if (frame === length - 1) go(0);
    const period = 1000 / fps;
    let last = performance.now();
    const tick = (now) => {
      if (!plays || !alive()) return;
      let next = frame;
      while (now - last >= period && kept.has(next + 1)) {
        next += 1; // never past what has arrived: it plays slower rather than skipping
        last += period;
      }
      if (now - last > period) last = now - period;
      if (next !== frame) go(next);
      if (frame === length - 1) play(false);
      else requestAnimationFrame(tick);
    };
    direction = 1;
    fetchFrames();
    requestAnimationFrame(tick);
  }

  return { show, receive, go, play, at: () => frame };
}

// --- the page: episodes to pick from, cameras, one timeline that zooms, keys ----------------------------------------
// A view appends its tracks and rows to what is returned, then calls `start` with what it does when
//   began(): another episode is shown;      drawn(): the kernel has said something;
//   playhead(frame): the playhead moved;    spanned(): the timeline shows other frames;
//   message(content, buffers): its own message came;      status(): what to say where nothing is wrong.
// `keys` are its keys beside the player's; `fields` take letters; while it is `busy()` the timeline stays as it is.

function playerPage({ model, el, kind, pickedBy = "", help }) {
  const get = (name) => model.get(name);
  const command = (name, content = {}) => model.send({ do: name, ...content });

  const picker = make("select", { className: "picker", title: `episode${pickedBy}` });
  picker.append(...get("picker").map(([i]) => make("option", { value: i }, `episode ${i}`)));
  picker.onchange = () => turnTo(Number(picker.value));
  const [reason, count] = ["reason", "quiet"].map((className) => make("span", { className }));
  const pictures = get("cameras").map(() => make("canvas"));
  const cameras = make("div", { className: "cameras" });
  get("cameras").forEach((name, i) => cameras.append(make("figure", {}, pictures[i], make("figcaption", {}, name))));
  const starter = button("▶", "play, pause (Space)", () => player.play());
  const time = make("span", { className: "time" });
  const zoomer = button("zoom", "zoom the timeline (z)", () => zoom());
  const slider = make("input", { type: "range", min: 0, step: 1, title: "frame" });
  slider.oninput = () => player.go(Number(slider.value));
  const tracks = make("div", { className: "tracks" }, label("frame"), slider);
  const message = make("div", { className: "message" });
  const keyList = make("details", {}, make("summary", {}, "keys (click the widget first)"), make("dl"));
  for (const [key, text] of [...HELP, ...help])
    keyList.lastChild.append(make("div", {}, make("dt", {}, key), make("dd", {}, text)));
  const root = make(
    "div",
    { className: `sarm-player ${kind}`, tabIndex: 0 },
    make("div", { className: "row" }, button("‹", "previous episode (p)", () => turn(-1)), picker,
      button("›", "next episode (n)", () => turn(1)), count, reason),
    cameras,
    make("div", { className: "row" }, starter, button("−1", "one frame back (←)", () => player.go(player.at() - 1)),
      button("+1", "one frame on (→)", () => player.go(player.at() + 1)), time, zoomer),
    tracks,
    message,
    keyList,
  );
  el.append(root);

  let view = null, episode = null, unreadable = "";
  const player = framePlayer({
    pictures,
    fps: get("fps"),
    alive: () => root.isConnected,
    ask: (of, frame) => command("send_frame", { episode: of, frame }),
    moved: () => drawPlayhead(),
    rested: (frame) => command("rest", { episode, frame }),
    playing: (on) => (starter.textContent = on ? "❚❚" : "▶"),
    shown: (frame, error) => {
      unreadable = error;
      say();
      root.dataset.shown = `${episode}:${frame}`;
    },
  });

  // --- the timeline

  let span = [0, 1]; // frames on the timeline, from and to
  let zoomed = false;
  const place = (at) => (100 * (at - span[0])) / (span[1] - span[0]); // per cent of the timeline's width

  function frameAt(event, node) {
    const box = node.getBoundingClientRect();
    return span[0] + ((event.clientX - box.left) / box.width) * (span[1] - span[0]);
  }

  function zoom() {
    zoomed = !zoomed;
    zoomer.classList.toggle("on", zoomed);
    span = [0, get("length")];
    view.spanned();
    drawPlayhead();
  }

  function drawPlayhead() {
    const length = get("length"), frame = player.at(), wide = Math.min(ZOOMED, length);
    const inSight = frame >= span[0] + wide / 8 && frame <= span[1] - wide / 8;
    if (zoomed && !view.busy() && (span[1] - span[0] !== wide || !inSight)) {
      const from = clamp(Math.round(frame - wide / 2), 0, length - wide);
      if (from !== span[0] || from + wide !== span[1]) {
        span = [from, from + wide];
        view.spanned();
      }
    }
    slider.value = frame;
    view.playhead(frame);
  }

  const clock = (frame) => `${(frame / get("fps")).toFixed(2)} s`;

  // --- what the kernel says

  function say() {
    const wrong = get("error") || unreadable;
    message.textContent = wrong || view.status();
    message.classList.toggle("error", Boolean(wrong));
  }

  function draw() {
    if (get("error") || get("episode") === turningTo) turningTo = null;
    if (episode !== get("episode")) {
      episode = get("episode");
      span = [0, get("length")];
      slider.max = get("length") - 1;
      player.show(episode, get("length"), get("frame"));
      root.dataset.episode = episode;
      view.began();
    }
    const rows = get("picker"), index = rows.findIndex(([i]) => i === episode);
    picker.selectedIndex = index;
    reason.textContent = index < 0 ? "" : rows[index][1];
    count.textContent = `${index + 1} of ${rows.length}`;
    view.drawn();
    say();
    drawPlayhead();
  }

  let turningTo = null; // the episode that was asked for, until the kernel shows it

  function turnTo(wanted) {
    command("show_episode", { episode: (turningTo = wanted) });
  }

  function turn(step) {
    const rows = get("picker"), next = rows[rows.findIndex(([i]) => i === (turningTo ?? episode)) + step];
    if (next) turnTo(next[0]);
  }

  function receive(content, buffers) {
    if ("go" in content) player.go(content.go);
    else if ("frame" in content) player.receive(content, buffers);
    else view.message(content, buffers);
  }

  // --- keys

  const step = (by) => (event) => player.go(player.at() + by * (event.shiftKey ? 10 : 1));
  const keys = {
    ArrowLeft: step(-1),
    ArrowRight: step(1),
    Home: () => player.go(0),
    End: () => player.go(get("length") - 1),
    " ": () => player.play(),
    z: () => zoom(),
    n: () => turn(1),
    p: () => turn(-1),
  };

  // In JupyterLab's command mode a, d or x edit the notebook's cells. Its newer versions see keys after this widget,
  // which stops them below; older ones see them before, and heed this attribute. With Ctrl held it is off, so that
  // saving the notebook still works.
  const guard = (event) => root.toggleAttribute("data-lm-suppress-shortcuts", !(event.ctrlKey || event.metaKey));
  guard({});
  root.addEventListener("focusin", guard);
  root.addEventListener("keyup", guard);
  root.addEventListener("keydown", (event) => {
    guard(event);
    // Some keyboards type brackets with AltGr (Ctrl and Alt, on Windows) or Option.
    const typed = event.altKey && !event.metaKey && /^[^\p{L}\p{N}\s]$/u.test(event.key);
    if ((event.ctrlKey || event.metaKey || event.altKey) && !typed) return;
    event.stopPropagation();
    if (event.target === picker || view.fields.includes(event.target)) {
      if (["Escape", "Enter"].includes(event.key)) root.focus();
      return;
    }
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key; // also with caps lock
    const shifted = event.shiftKey && SHIFTED[event.code]; // whatever another keyboard has there
    const act = view.keys[key] ?? keys[key] ?? view.keys[shifted];
    if (!act) return;
    event.preventDefault();
    act(event);
  });
  root.addEventListener("click", (event) => {
    if (!event.target.closest("input, select, summary")) root.focus({ preventScroll: true });
  });
  picker.addEventListener("change", () => root.focus({ preventScroll: true }));

  // --- life

  const nothing = () => {};
  const SILENT = { began: nothing, drawn: nothing, spanned: nothing, message: nothing, busy: () => false, status: () => "" };

  // Begin to draw, also when one of the view's own `traits` changes. Returns what ends it.
  function start(given, traits = []) {
    view = { ...SILENT, keys: {}, fields: [], ...given };
    const watched = ["episode", "error", ...traits];
    watched.forEach((trait) => model.on(`change:${trait}`, draw));
    model.on("msg:custom", receive);
    draw();
    return () => {
      player.play(false);
      watched.forEach((trait) => model.off(`change:${trait}`, draw));
      model.off("msg:custom", receive);
    };
  }

  const nodes = { root, tracks, message, time, picker, count };
  return { get, command, ...nodes, go: player.go, at: player.at, span: () => span, place, frameAt, clock, drawPlayhead, start };
}
