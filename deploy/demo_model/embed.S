// The bytes of the demo model between two symbols, for launcher/demo_model.cc.
    .section .rodata
    .balign 64
    .global shoal_demo_model_begin
shoal_demo_model_begin:
    .incbin SHOAL_DEMO_MODEL
    .global shoal_demo_model_end
shoal_demo_model_end:
    .byte 0
    .section .note.GNU-stack, "", @progbits
