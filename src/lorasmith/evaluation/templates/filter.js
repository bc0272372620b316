"use strict";
// Shows the questions that hold the searched words and are of the chosen kind. Without scripts all are shown.
const questions = [...document.querySelectorAll(".question")];
const search = document.querySelector("#search");
const buttons = [...document.querySelectorAll(".tools button")];
const shown = document.querySelector(".tools output");
let kind = "all";

function show() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const question of questions) {
    const text = question.textContent.toLowerCase();
    const fits = kind === "all" || question.dataset.kinds.split(" ").includes(kind);
    question.hidden = !(fits && words.every((word) => text.includes(word)));
    count += !question.hidden;
  }
  for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.kind === kind));
  shown.textContent = `${count} of ${questions.length} shown`;
}

if (search) {
  search.addEventListener("input", show);
  for (const button of buttons) {
    button.addEventListener("click", () => { kind = button.dataset.kind; show(); });
  }
  show();
}
addEventListener("beforeprint", () => { for (const part of document.querySelectorAll("details")) part.open = true; });
