-- A page with code begins with a badge that opens its notebook in Colab
local colab = 'https://colab.research.google.com/'
local notebooks = colab .. 'github/rholoss-fastai/rholoss_fastai/blob/main/nbs/'

function Pandoc(doc)
  local input = (quarto and quarto.doc and quarto.doc.input_file or ''):gsub('\\', '/')
  local notebook = input:match('/_proc/(.+%.ipynb)$')
  local has_code = false
  doc:walk { CodeBlock = function(block) has_code = has_code or block.classes:includes 'cell-code' end }
  if not (notebook and has_code) then return nil end
  local badge = pandoc.Image({ pandoc.Str 'Open in Colab' }, colab .. 'assets/colab-badge.svg')
  table.insert(doc.blocks, 1, pandoc.Para { pandoc.Link({ badge }, notebooks .. notebook) })
  return doc
end
