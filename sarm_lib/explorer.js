// The explorer's view: frames of all cameras over panels of curves, one playhead through all of them. It asks the
// kernel (explorer.py) with {do: command, ...} and never sets a trait: their echoes would arrive late and move the
// playhead back. From the kernel come changed traits, {go: frame}, frames ({episode, frame, error}, one JPEG a camera)
// and panels ({episode, panels}, one buffer of float32 a panel).

const AHEAD = 4; // frames to fetch in the direction of the last move, so that the next one is there already
const AHEAD_PLAYING = 12;
const IN_FLIGHT = 3; // frames asked for at a time: a jump never waits for more than these
const KEPT = 240; // frames kept as JPEGs
const ZOOMED = 90; // frames on the timeline when it is zoomed: wide enough to see each
const MARGIN = 4; // pixels over and under lines, so that 0 and 1 are seen whole
const SECONDS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600];
const HELP = [
  ["← →", "one frame back, on (with Shift: 10)"],
  ["Home End", "first, last frame"],
  ["Space", "play, pause"],
  ["z", "zoom the timeline"],
  ["n p", "next, previous episode"],
];

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

const written = (value, digits) => value.toFixed(digits).replace("-", "−");

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// --- a player: one episode's frames, fetched when they are looked at ------------------------------------------------
// It knows nothing of panels. `ask(episode, frame)` requests a frame, whose answer goes to `receive`; `moved(frame)`,
// `shown(frame, error)`, `rested(frame)` and `playing(on)` tell the page; `pictures` are the cameras' canvases.

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
    const decoded = await Promise.all(images.map((image) => createImageBitmap(image)));
    if (mine < painted || of !== episode) return; // a later one was faster
    painted = mine;
    pictures.forEach((canvas, i) => {
      const { width, height } = decoded[i] ?? canvas;
      if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
      canvas.parentNode.style.setProperty("--ratio", width / height);
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

// --- curves ---------------------------------------------------------------------------------------------------------

// Frames [from, to) in as many groups as there are pixels, or one each: an episode of 10,000 frames draws as fast as
// one of 500.
function columns(from, to, pixels) {
  const count = clamp(Math.floor(pixels), 1, to - from);
  const edge = (i) => from + Math.floor((i * (to - from)) / count);
  return Array.from({ length: count }, (_, i) => [edge(i), edge(i + 1)]);
}

// A line keeps the extremes of every pixel: a peak of one frame stays in sight.
function drawLine(context, values, groups, x, y) {
  context.beginPath();
  for (const [from, to] of groups) {
    const at = x((from + to) / 2), [first, last] = [values[from], values[to - 1]];
    let low = first, high = first;
    for (let i = from + 1; i < to; i++) {
      low = Math.min(low, values[i]);
      high = Math.max(high, values[i]);
    }
    for (const value of to - from > 1 ? [first, low, high, last] : [first]) context.lineTo(at, y(value));
  }
  context.stroke();
}

// Stacked areas show the mean of every pixel's frames, whose sum is that of the frames.
function drawAreas(context, curves, colours, groups, x, y) {
  const places = groups.map(([from, to]) => x((from + to) / 2));
  places[0] = x(groups[0][0]); // to both ends of the plot, not from the middle of the first frame
  places.push(x(groups.at(-1)[1]));
  let below = places.map(() => 0);
  curves.forEach((values, k) => {
    const above = groups.map(([from, to], i) => {
      let sum = 0;
      for (let j = from; j < to; j++) sum += values[j];
      return below[i] + sum / (to - from);
    });
    above.push(above.at(-1));
    context.beginPath();
    places.forEach((at, i) => context.lineTo(at, y(above[i])));
    for (let i = places.length - 1; i >= 0; i--) context.lineTo(places[i], y(below[i]));
    context.fillStyle = context.strokeStyle = colours[k];
    context.fill();
    context.lineWidth = 0.5; // no seam between two areas
    context.stroke();
    below = above;
  });
}

function niceTicks(low, high, most) {
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((s) => s * power >= rough * 0.999) ?? 10), first = Math.ceil(low / step - 1e-6);
  const count = Math.floor(high / step + 1e-6) - first + 1;
  const digits = clamp(-Math.floor(Math.log10(step) + 1e-6), 0, 6);
  return Array.from({ length: count }, (_, i) => [(first + i) * step, written((first + i) * step, digits)]);
}

function render({ model, el }) {
  const get = (name) => model.get(name);
  const command = (name, content = {}) => model.send({ do: name, ...content });

  // --- the page -----------------------------------------------------------------------------------------------------

  const button = (text, title, onclick) => make("button", { type: "button", textContent: text, title, onclick });
  const label = (text) => make("span", { className: "label" }, text);
  const picker = make("select", { className: "picker", title: "episode" });
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
  const stack = make("div", { className: "panels" });
  const axis = make("div", { className: "axis" });
  const tag = make("div", { className: "tag" });
  const message = make("div", { className: "message" });
  const help = make("details", {}, make("summary", {}, "keys (click the widget first)"), make("dl"));
  for (const [key, text] of HELP) help.lastChild.append(make("div", {}, make("dt", {}, key), make("dd", {}, text)));
  const root = make(
    "div",
    { className: "sarm-explorer", tabIndex: 0 },
    make("div", { className: "row" }, button("‹", "previous episode (p)", () => turn(-1)), picker,
      button("›", "next episode (n)", () => turn(1)), count, reason),
    cameras,
    make("div", { className: "row" }, starter, button("−1", "one frame back (←)", () => player.go(player.at() - 1)),
      button("+1", "one frame on (→)", () => player.go(player.at() + 1)), time, zoomer),
    make("div", { className: "tracks" }, label("frame"), slider, stack,
      make("span", { className: "label unit" }, "s"), axis),
    message,
    help,
  );
  el.append(root);

  let episode = null, unreadable = "";
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

  // --- panels -------------------------------------------------------------------------------------------------------

  let panels = []; // of the shown episode
  let span = [0, 1]; // frames on the timeline, from and to
  let zoomed = false;
  const place = (at) => (100 * (at - span[0])) / (span[1] - span[0]);

  function receivePanels(content, buffers) {
    if (content.episode !== episode) return;
    panels = content.panels.map((spec, i) => build(spec, buffers[i]));
    stack.replaceChildren(...panels.flatMap(({ head, ticks, plot }) => [head, ticks, plot]));
    root.style.setProperty("--panels", Math.max(1, panels.length));
    root.classList.remove("waiting");
    root.dataset.panels = episode;
    drawCurves();
    drawPlayhead();
  }

  function build(spec, buffer) {
    const { buffer: whole = buffer, byteOffset: start = 0, byteLength } = buffer; // a DataView, or an ArrayBuffer
    const values = new Float32Array(whole.slice(start, start + byteLength)), length = values.length / spec.names.length;
    const curves = spec.names.map((_, k) => values.subarray(k * length, (k + 1) * length));
    const [low, high] = spec.domain, lines = spec.kind === "lines";
    const margin = lines ? MARGIN : 0; // and what leaves the domain stays at its edge: the readout has its value
    const y = (value, tall) => margin + (tall - 2 * margin) * clamp((high - value) / (high - low), 0, 1);
    const canvas = make("canvas"), playhead = make("div", { className: "playhead" });
    const plot = make("div", { className: `plot ${spec.kind}` });
    const ticks = make("div", { className: `ticks ${spec.kind}` });
    for (const [value, text] of niceTicks(low, high, 3)) {
      const top = `calc(${margin}px + (100% - ${2 * margin}px) * ${(high - value) / (high - low)})`;
      const grid = make("div", { className: "grid" }), tick = make("span", {}, text);
      grid.style.top = tick.style.top = top;
      plot.append(grid);
      ticks.append(tick);
    }
    const head = make("div", { className: `head ${spec.kind}` }, make("span", { className: "title" }, spec.title));
    const readings = spec.names.map((name, k) => {
      const swatch = make("i", { className: spec.dashed.includes(name) ? "dashed" : "" }), reading = make("b");
      swatch.style.color = spec.colours[k];
      head.append(make("span", { className: "curve" }, swatch, name, reading));
      return reading;
    });
    const dots = lines ? spec.names.map(() => make("div", { className: "dot" })) : [];
    dots.forEach((dot, k) => (dot.style.background = spec.colours[k]));
    plot.append(canvas, playhead, ...dots.toReversed()); // the first curve is on top
    follow(plot);
    return { ...spec, curves, lines, y, canvas, playhead, plot, ticks, head, readings, dots };
  }

  function drawCurves() {
    const [from, to] = span, sharp = window.devicePixelRatio || 1;
    for (const { names, curves, colours, dashed, lines, y, canvas, plot } of panels) {
      const wide = plot.clientWidth, tall = plot.clientHeight;
      if (!wide) continue; // in a hidden tab: drawn when it gets a size
      Object.assign(canvas, { width: Math.round(wide * sharp), height: Math.round(tall * sharp) });
      const context = canvas.getContext("2d");
      context.scale(canvas.width / wide, canvas.height / tall);
      context.lineJoin = "round";
      const x = (at) => (wide * (at - from)) / (to - from), of = (value) => y(value, tall);
      // One frame more on both sides: zoomed in, curves go on to the edge.
      const groups = columns(Math.max(0, from - 1), Math.min(curves[0].length, to + 1), wide);
      if (!lines) {
        drawAreas(context, curves, colours, groups, x, of);
        continue;
      }
      context.lineWidth = 2;
      for (let k = curves.length - 1; k >= 0; k--) {
        context.strokeStyle = colours[k];
        context.setLineDash(dashed.includes(names[k]) ? [6, 4] : []);
        drawLine(context, curves[k], groups, x, of);
      }
    }
    drawAxis();
  }

  function drawAxis() {
    const [from, to] = span.map((at) => at / get("fps")), most = Math.max(2, axis.clientWidth / 64);
    const step = SECONDS.find((s) => (to - from) / s <= most) ?? (to - from) / 4;
    const digits = step < 0.1 ? 2 : step < 1 ? 1 : 0;
    axis.replaceChildren();
    for (let i = Math.ceil(from / step - 1e-6); i * step < to; i++) {
      const tick = make("span", {}, (i * step).toFixed(digits));
      tick.style.left = `${place(i * step * get("fps") + 0.5)}%`; // the middle of its frame, as for the playhead
      axis.append(tick);
    }
    axis.append(tag);
  }

  function drawPlayhead() {
    const length = get("length"), frame = player.at(), wide = Math.min(ZOOMED, length);
    const inSight = frame >= span[0] + wide / 8 && frame <= span[1] - wide / 8;
    if (zoomed && !dragging && (span[1] - span[0] !== wide || !inSight)) {
      const from = clamp(Math.round(frame - wide / 2), 0, length - wide);
      if (from !== span[0] || from + wide !== span[1]) {
        span = [from, from + wide];
        drawCurves();
      }
    }
    slider.value = frame;
    const seconds = `${(frame / get("fps")).toFixed(2)} s`, at = place(frame + 0.5);
    const stages = [];
    for (const { names, curves, domain, lines, y, playhead, plot, readings, dots } of panels) {
      const values = curves.map((curve) => curve[frame]);
      const digits = clamp(2 - Math.floor(Math.log10(domain[1] - domain[0])), 0, 4);
      const most = lines ? -1 : values.indexOf(Math.max(...values));
      if (!lines) stages.push(names[most]);
      readings.forEach((reading, k) => {
        reading.textContent = written(values[k], digits);
        reading.parentNode.classList.toggle("most", k === most);
      });
      playhead.style.left = `${at}%`;
      const tops = values.map((value) => `${y(value, plot.clientHeight)}px`);
      dots.forEach((dot, k) => Object.assign(dot.style, { left: `${at}%`, top: tops[k] }));
    }
    const stage = make("span", { className: "stage" }, ...stages.map((name) => ` · ${name}`));
    time.replaceChildren(`${frame} of ${length - 1} · ${seconds}`, stage);
    tag.textContent = [seconds, ...stages].join(" · ");
    const within = clamp(at, 0, 100); // at the left end it stands right of the playhead, at the right end left of it
    Object.assign(tag.style, { left: `${within}%`, transform: `translateX(-${within}%)` });
  }

  function zoom() {
    zoomed = !zoomed;
    zoomer.classList.toggle("on", zoomed);
    span = [0, get("length")];
    drawPlayhead();
    drawCurves();
  }

  let dragging = false;
  function follow(plot) {
    const toMouse = (event) => {
      const box = plot.getBoundingClientRect();
      player.go(Math.floor(span[0] + ((event.clientX - box.left) / box.width) * (span[1] - span[0])));
    };
    plot.onpointerdown = (event) => {
      if (event.button !== 0) return;
      dragging = true;
      plot.setPointerCapture(event.pointerId);
      toMouse(event);
    };
    plot.onpointermove = (event) => dragging && toMouse(event);
    plot.onpointerup = plot.onpointercancel = () => (dragging = false);
  }

  // --- drawing what the kernel says ---------------------------------------------------------------------------------

  function say() {
    const wrong = get("error") || unreadable;
    message.textContent = wrong;
    message.classList.toggle("error", Boolean(wrong));
  }

  function draw() {
    if (get("error") || get("episode") === turningTo) turningTo = null;
    if (episode !== get("episode")) {
      episode = get("episode");
      panels = []; // the old ones stay on the page, pale, until the new ones arrive: nothing jumps
      root.classList.add("waiting");
      span = [0, get("length")];
      slider.max = get("length") - 1;
      player.show(episode, get("length"), get("frame"));
      command("send_panels", { episode });
      root.dataset.episode = episode;
    }
    const rows = get("picker"), index = rows.findIndex(([i]) => i === episode);
    picker.selectedIndex = index;
    reason.textContent = index < 0 ? "" : rows[index][1];
    count.textContent = `${index + 1} of ${rows.length}`;
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

  // --- keys ---------------------------------------------------------------------------------------------------------

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
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    event.stopPropagation();
    if (event.target === picker) {
      if (["Escape", "Enter"].includes(event.key)) root.focus();
      return;
    }
    const act = keys[event.key];
    if (!act) return;
    event.preventDefault();
    act(event);
  });
  root.addEventListener("click", (event) => {
    if (!event.target.closest("input, select, summary")) root.focus({ preventScroll: true });
  });
  picker.addEventListener("change", () => root.focus({ preventScroll: true }));

  // --- life ---------------------------------------------------------------------------------------------------------

  function receive(content, buffers) {
    if ("go" in content) player.go(content.go);
    else if ("panels" in content) receivePanels(content, buffers);
    else player.receive(content, buffers);
  }

  const traits = ["episode", "error"];
  const sized = new ResizeObserver(() => {
    root.classList.toggle("narrow", axis.clientWidth < 400);
    drawCurves();
    drawPlayhead();
  });
  traits.forEach((trait) => model.on(`change:${trait}`, draw));
  model.on("msg:custom", receive);
  draw();
  sized.observe(axis); // as wide as every plot
  return () => {
    player.play(false);
    sized.disconnect();
    traits.forEach((trait) => model.off(`change:${trait}`, draw));
    model.off("msg:custom", receive);
  };
}

export default { render };
