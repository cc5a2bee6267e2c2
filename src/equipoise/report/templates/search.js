"use strict";
(() => {
  const root = document.documentElement;
  const theme = document.getElementById("theme");
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);
  const show = () => theme.setAttribute("aria-pressed", String(isDark()));
  theme.hidden = false;
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    show();
  });
  prefersDark.addEventListener("change", show);
  show();

  const gallery = document.getElementById("gallery");
  const told = document.getElementById("told");
  const cards = [...gallery.querySelectorAll(".card")];
  const choose = (card) => {
    for (const other of cards) other.setAttribute("aria-pressed", String(other === card));
    const { rank, name, score, trained, keywords } = card.dataset;
    told.textContent = `${rank}. ${name}: cosine ${score}, ${trained}.` + (keywords ? ` Also called: ${keywords}.` : "");
  };
  const focus = (card) => {
    for (const other of cards) other.tabIndex = other === card ? 0 : -1;
    card.focus();
  };
  // The number of columns is a matter of the window: cards beside the first one have its height.
  const columns = () => {
    const top = cards[0].getBoundingClientRect().top;
    return cards.filter((card) => Math.abs(card.getBoundingClientRect().top - top) < 2).length;
  };
  for (const [place, card] of cards.entries()) {
    card.addEventListener("click", () => {
      focus(card);
      choose(card);
    });
    card.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns(), ArrowUp: -columns() };
      const ends = { Home: 0, End: cards.length - 1 };
      const next = event.key in ends ? ends[event.key] : place + (steps[event.key] ?? 0);
      if (!(event.key in steps || event.key in ends)) return;
      event.preventDefault();
      if (cards[next]) focus(cards[next]);
    });
  }
})();
