-- Headings of functions and classes stand in the page itself, not in a cell's Div: so "On this page" lists them
function Div(div)
  local has_heading = div.classes:includes 'cell' and div.content:find_if(function(block) return block.t == 'Header' end)
  if has_heading then return div.content end
end
