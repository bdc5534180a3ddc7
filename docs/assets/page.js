// What every page does once it is there.

// Sets every formula. One that KaTeX cannot set is reported on the console, which the
// browser checks read.
function setFormulas() {
  for (const element of document.querySelectorAll(".arithmatex")) {
    renderMathInElement(element, {
      delimiters: [
        { left: "\\[", right: "\\]", display: true },
        { left: "\\(", right: "\\)", display: false },
      ],
      throwOnError: true,
    });
  }
}

// Marks the figures that would shrink so far that their letters could not be read.
function markWideFigures() {
  for (const figure of document.querySelectorAll('article img[src$=".svg"]')) {
    const box = figure.parentElement;
    box.classList.toggle("wide-figure", figure.naturalWidth > 1.6 * box.clientWidth);
  }
}

// Lets the keyboard reach, and so scroll, whatever is wider or longer than its box.
function letScroll() {
  const boxes =
    "pre > code, .katex-display, .md-typeset__scrollwrap, .wide-figure, .hbp-hero";
  for (const box of document.querySelectorAll(boxes)) {
    const longer = box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight;
    if (longer) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}

// Names what the theme leaves without a name. The buttons of each code block are no
// place that a reader would want to jump to.
function nameParts() {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  for (const buttons of document.querySelectorAll(".md-code__nav")) {
    buttons.setAttribute("role", "none");
  }
  // The empty corner of a table heads neither a row nor a column.
  for (const corner of document.querySelectorAll("th:empty")) {
    corner.replaceWith(document.createElement("td"));
  }
}

function fit() {
  markWideFigures();
  letScroll();
}

document.addEventListener("DOMContentLoaded", setFormulas);
window.addEventListener("load", () => {
  nameParts();
  fit();
});
window.addEventListener("resize", fit);
document.addEventListener("toggle", fit, true);
