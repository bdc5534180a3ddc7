// Moves the arrow of the figure in docs/explorer.md. Everything is drawn already, and
// every number computed: see tools/draw_explorer.py.
(() => {
  "use strict";
  const figure = document.querySelector(".explorer");
  const byName = (name) => document.getElementById(`explorer-${name}`);
  const { alphas, loss, map, chart, steps } = JSON.parse(byName("numbers").textContent);
  const alphaSlider = byName("alpha");
  const iterationsSlider = byName("iterations");

  const onMap = ([x, y]) => [map.left + map.scale * x, map.bottom - map.scale * y];

  function onChart(position, value) {
    const x = chart.edge + chart.width * position / (alphas.length - 1);
    return [x, chart.height * (chart.high - value) / (chart.high - chart.low)];
  }

  function move(selector, xName, yName, [x, y]) {
    const element = figure.querySelector(selector);
    element.setAttribute(xName, x.toFixed(1));
    element.setAttribute(yName, y.toFixed(1));
  }

  // With a minus that is as wide as a plus.
  function write(name, words) {
    byName(name).textContent = words.replace("-", "−");
  }

  function show() {
    // To the right α grows, as on the axis of the chart above the slider.
    const position = Number(alphaSlider.value);
    const index = alphas.length - 1 - position;
    const count = Number(iterationsSlider.value) + 1;
    const step = steps[count - 1][index];
    const [, , length, predicted, actual, residual] = step;

    const alpha = String(alphas[index]);
    write("alpha-value", alpha);
    write("iterations-value", String(count));
    alphaSlider.setAttribute("aria-valuetext", `α = ${alpha}`);
    const allowed = `${count} CG ${count === 1 ? "iteration" : "iterations"}`;
    iterationsSlider.setAttribute("aria-valuetext", allowed);
    write("when", `At α = ${alpha}, with ${allowed}:`);

    const iterates = [[0, 0], ...steps.slice(0, count).map((row) => row[index])];
    const points = iterates.map((p) => onMap(p).map((c) => c.toFixed(1)).join(","));
    figure.querySelector(".iterates").setAttribute("points", points.join(" "));
    move(".arrow", "x2", "y2", onMap(step));
    move(".real.marker", "cx", "cy", onChart(position, loss - actual));
    move(".model.marker", "cx", "cy", onChart(position, loss - predicted));
    for (const element of figure.querySelectorAll("[data-iterations]")) {
      element.classList.toggle("chosen", Number(element.dataset.iterations) === count);
    }

    write("length", length.toFixed(2));
    write("residual", `${(100 * residual).toFixed(0)} %`);
    write("predicted", predicted.toFixed(2));
    write("actual", actual.toFixed(2));
    write("kept", `${(100 * actual / predicted).toFixed(0)} %`);
  }

  const check = byName("quadratic");
  check.addEventListener("change", () => {
    figure.querySelector(".quadratic").toggleAttribute("hidden", !check.checked);
  });
  for (const button of figure.querySelectorAll(".presets button")) {
    button.addEventListener("click", () => {
      alphaSlider.value = alphas.length - 1 - Number(button.dataset.alpha);
      iterationsSlider.value = Number(button.dataset.count) - 1;
      show();
    });
  }
  alphaSlider.addEventListener("input", show);
  iterationsSlider.addEventListener("input", show);
  figure.querySelector(".controls").hidden = false;
  show();
})();
