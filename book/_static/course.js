// What scrolls sideways can be reached and scrolled with the keyboard too.
window.addEventListener("load", async () => {
  await window.MathJax?.startup?.promise;
  const scrolling = 'mjx-container[display="true"], .cell_output .output, .player, .pst-scrollable-table-container, pre';
  const mark = () => {
    for (const box of document.querySelectorAll(scrolling))
      if (box.scrollWidth > box.clientWidth + 1 && ["auto", "scroll"].includes(getComputedStyle(box).overflowX))
        box.tabIndex = 0;
  };
  mark();
  window.addEventListener("resize", mark);
});
