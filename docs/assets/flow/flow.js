// Changes the figure in docs/flow.md. Everything is drawn already, and every number
// computed: see tools/draw_flow.py.
(() => {
  "use strict";
  const figure = document.querySelector(".flow");
  const byName = (name) => document.getElementById(`flow-${name}`);
  const { states, walks, place } = JSON.parse(byName("numbers").textContent);
  const controls = figure.querySelector(".controls");
  const button = byName("step");
  const tiles = [...figure.querySelectorAll(".tile")];
  const tileNumbers = figure.querySelectorAll("text.largest");
  const large = figure.querySelector(".step");
  const last = tiles.length - 1;
  let frame = 0;

  // With a minus that is as wide as a plus.
  const tell = (value) => String(value).replace("-", "−");
  // Stored as 0 is what lies below the scale.
  const tellEigenvalue = (value) => value ? tell(value) : "about 0";
  const chosen = (name) => controls.elements[`flow-${name}`].value;

  // The matrix has entries in percent of its largest: a lower triangle.
  function paint(parent, percents, side) {
    const size = Math.round((Math.sqrt(8 * percents.length + 1) - 1) / 2);
    const cells = parent.querySelector(".cells");
    const cell = side / size;
    while (cells.children.length > size * size) cells.lastChild.remove();
    while (cells.children.length < size * size) {
      cells.append(cells.firstElementChild.cloneNode());
    }
    let signs = "";
    for (let i = 0; i < size; i++) {
      for (let j = 0; j < size; j++) {
        const value = percents[i < j ? j * (j + 1) / 2 + i : i * (i + 1) / 2 + j];
        const rect = cells.children[i * size + j];
        rect.setAttribute("x", j * cell);
        rect.setAttribute("y", i * cell);
        rect.setAttribute("width", cell);
        rect.setAttribute("height", cell);
        rect.setAttribute("fill-opacity", Math.abs(value) / 100);
        rect.classList.toggle("negative", value < 0);
        if (value < 0) {
          const [x, y] = [(j + 0.28) * cell, (i + 0.5) * cell];
          signs += `M${x.toFixed(1)} ${y.toFixed(1)}h${(0.44 * cell).toFixed(1)}`;
        }
      }
    }
    parent.querySelector(".minus").setAttribute("d", signs);
  }

  function height(value) {
    return value ? place.strip - place.decade * Math.log10(Math.abs(value)) : place.edge;
  }

  function showLayers(layers, alpha) {
    const marks = figure.querySelectorAll(".mark");
    let m = 0;
    layers.forEach(([largest, percents, values], k) => {
      paint(tiles[k], percents, place.side);
      tileNumbers[k].textContent = tell(largest);
      values.forEach((value, i) => {
        const shift = (i - (values.length - 1) / 2) * place.gap;
        const x = place.left + k * place.column + place.side / 2 + shift;
        const y = height(value).toFixed(1);
        marks[m].setAttribute("transform", `translate(${x.toFixed(1)} ${y})`);
        marks[m].classList.toggle("negative", value < 0);
        m += 1;
      });
    });
    const y = height(alpha);
    const line = figure.querySelector("line.alpha");
    line.setAttribute("y1", y.toFixed(1));
    line.setAttribute("y2", y.toFixed(1));
    const shade = figure.querySelector(".overtaken");
    shade.setAttribute("y", y.toFixed(1));
    shade.setAttribute("height", (place.edge + 14 - y).toFixed(1));
    const right = line.getAttribute("x2");
    const name = figure.querySelector(".alpha-name");
    name.setAttribute("transform", `translate(${right} ${y.toFixed(1)})`);
  }

  function tellLayers(layers, alpha) {
    const words = (name) => {
      const checked = `input[name="flow-${name}"]:checked`;
      return controls.querySelector(checked).parentElement.textContent.trim();
    };
    byName("when").textContent =
      `${words("treatment")}, ${words("scheme")}, batch size ${words("batch")}, ` +
      `${words("activation")}, α = ${words("alpha")}. Eigenvalues:`;
    const rows = figure.querySelectorAll("#flow-rows .row");
    layers.forEach(([, , values], k) => {
      const below = values.filter((value) => Math.abs(value) < alpha).length;
      rows[last - k].textContent =
        `Layer ${k + 1}: from ${tellEigenvalue(values[0])} to ` +
        `${tellEigenvalue(values[values.length - 1])}; ` +
        `${below} of ${values.length} below α`;
    });
  }

  // Frame 0 is the output; three follow for each layer below.
  function showStep(layers) {
    const walkable = chosen("scheme") === "jacobian";
    button.disabled = !walkable;
    if (!walkable) frame = 0;
    const operation = (frame + 2) % 3;
    const above = last + 1 - Math.floor((frame - 1) / 3);
    let matrix = layers[last];
    let name = "H, at the output";
    let where = "where the Hessian pass begins, the curvature of the loss with respect " +
      "to the outputs of layer 4.";
    if (frame) {
      const below = above - 1;
      const walk = walks[chosen("activation")][chosen("batch")][chosen("treatment")];
      matrix = operation < 2 ? walk[last + 1 - above][operation] : layers[below - 1];
      name = ["WᵀHW", "D H D", "+ diag(r)"][operation];
      where = [
        `back through the weight of layer ${above}: with respect to its inputs.`,
        `times the mean slopes of activation ${below}, from both sides.`,
        `the second-order terms of activation ${below}, after the treatment, join the ` +
          `diagonal: with respect to the outputs of layer ${below}.`,
      ][operation];
    }
    paint(large, matrix[1], 240);
    byName("operation").textContent = name;
    byName("where").textContent = walkable
      ? `${frame + 1} of ${1 + 3 * last}: ${where}`
      : "Steps back are shown for the averaged Jacobian only.";
    byName("largest").textContent = tell(matrix[0]);
  }

  function layersNow() {
    return states[chosen("activation")][chosen("scheme")][chosen("batch")][
      chosen("treatment")];
  }

  function show() {
    const layers = layersNow();
    const alpha = Number(chosen("alpha"));
    showLayers(layers, alpha);
    tellLayers(layers, alpha);
    showStep(layers);
  }

  button.addEventListener("click", () => {
    frame = (frame + 1) % (1 + 3 * last);
    showStep(layersNow());
  });
  controls.addEventListener("change", show);
  // A browser may remember what was chosen before.
  controls.reset();
  controls.hidden = false;
  button.hidden = false;
  show();
})();
