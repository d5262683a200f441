// The page's bytes, so that the binary needs no file beside it.
    .section .rodata
    .global shoal_web_page_begin
    .global shoal_web_page_end
shoal_web_page_begin:
    .incbin SHOAL_WEB_PAGE
shoal_web_page_end:
    .section .note.GNU-stack,"",%progbits
