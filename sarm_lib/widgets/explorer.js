// The explorer's view: under the player's frames stand panels of curves over an axis of seconds.

const SECONDS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600];

function render({ model, el }) {
  const page = playerPage({ model, el, kind: "sarm-explorer", help: [] });
  const { get, root, tracks, time, place, clock } = page;
  const axis = make("div", { className: "axis" });
  const tag = make("div", { className: "tag" });
  const panels = panelStack(page, () => {
    draw();
    page.drawPlayhead();
  });
  tracks.append(panels.node, make("span", { className: "label unit" }, "s"), axis);

  function draw() {
    panels.draw();
    const [from, to] = page.span().map((at) => at / get("fps")), most = Math.max(2, axis.clientWidth / 64);
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

  function drawPlayhead(frame) {
    const stages = panels.playhead(frame), at = place(frame + 0.5);
    const stage = make("span", { className: "stage" }, ...stages.map((name) => ` · ${name}`));
    time.replaceChildren(`${frame} of ${get("length") - 1} · ${clock(frame)}`, stage);
    tag.textContent = [clock(frame), ...stages].join(" · ");
    const within = clamp(at, 0, 100); // at the left end it stands right of the playhead, at the right end left of it
    Object.assign(tag.style, { left: `${within}%`, transform: `translateX(-${within}%)` });
  }

  const { began, receive, busy } = panels;
  const stop = page.start({ began, spanned: draw, playhead: drawPlayhead, message: receive, busy });
  const sized = new ResizeObserver(() => {
    root.classList.toggle("narrow", axis.clientWidth < 400);
    draw();
    page.drawPlayhead();
  });
  sized.observe(axis); // as wide as every plot
  return () => {
    stop();
    panels.stop();
    sized.disconnect();
  };
}

export default { render };
