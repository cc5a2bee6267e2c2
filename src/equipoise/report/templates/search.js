(() => {
  const gallery = page.get("gallery");
  const status = page.get("told");
  const cards = [...gallery.querySelectorAll(".card")];
  const choose = (card) => {
    for (const other of cards) other.setAttribute("aria-pressed", String(other === card));
    const { rank, name, score, trained, keywords } = card.dataset;
    status.textContent = `${rank}. ${name}: cosine ${score}, ${trained}.` + (keywords ? ` Also called: ${keywords}.` : "");
  };
  const focus = (card) => {
    for (const other of cards) other.tabIndex = other === card ? 0 : -1;
    card.focus();
  };
  // The number of columns depends on the window width: count the cards in the first row.
  const columns = () => {
    const top = cards[0].getBoundingClientRect().top;
    return cards.filter((card) => Math.abs(card.getBoundingClientRect().top - top) < 2).length;
  };
  for (const [index, card] of cards.entries()) {
    card.addEventListener("click", () => {
      focus(card);
      choose(card);
    });
    card.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns(), ArrowUp: -columns() };
      const ends = { Home: 0, End: cards.length - 1 };
      const next = event.key in ends ? ends[event.key] : index + (steps[event.key] ?? 0);
      if (!(event.key in steps || event.key in ends)) return;
      event.preventDefault();
      if (cards[next]) focus(cards[next]);
    });
  }
})();
